"""What the commands of ``blockrag eval`` share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Protocol

import typer
from rich.markdown import Markdown

from blockrag.cli import console
from blockrag.errors import SetupError
from blockrag.settings import Settings

DataOption = Annotated[
    Path, typer.Option(help="Questions (JSONL, may be gzipped), or a directory with dev/wiki_pattern_qa.jsonl.gz.")
]
QuestionsOption = Annotated[int, typer.Option(min=1, help="How many questions to draw.")]
BundleOption = Annotated[Path | None, typer.Option(help="Bundle; default: the settings', or the one that ships.")]
TypeOption = Literal["float32", "bfloat16"]
ComputeTypeOption = Annotated[
    TypeOption | None, typer.Option(help="Type of weights and activations; default: the settings', as served.")
]
KvType = Literal["float32", "bfloat16", "int8"]
KvTypeOption = Annotated[KvType | None, typer.Option(help="Type of cached K and V; default: the settings', as served.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the draw and of the intervals.")]


def measured_settings(
    settings: Path | None, bundle: Path | None, compute_dtype: TypeOption | None, kv_dtype: KvType | None
) -> Settings:
    """Settings of the system that is measured: those of a command's options, where they were given."""
    loaded = console.settings_from(settings)
    given = {"path": bundle and str(bundle), "compute_dtype": compute_dtype, "kv_dtype": kv_dtype}
    changed = {name: value for name, value in given.items() if value is not None}
    return loaded.model_copy(update={"bundle": loaded.bundle.model_copy(update=changed)})


def parse_numbers(text: str, option: str, most: int) -> tuple[int, ...]:
    """Distinct numbers of 1 to ``most``, ascending, from a list separated by commas. Raises ``SetupError``."""
    try:
        numbers = {int(part) for part in text.split(",") if part.strip()}
    except ValueError as error:
        raise SetupError(f"{option} {text!r}: write numbers separated by commas") from error
    if any(not 1 <= number <= most for number in numbers):
        raise SetupError(f"{option} {text!r}: each number must be 1 to {most}")
    return tuple(sorted(numbers))


def write_results(out: Path, files: Mapping[str, bytes]) -> None:
    """Write result files together and say where they are."""
    from blockrag.evaluation.report import write_together

    write_together(out, files)
    console.err.print(f"written: {', '.join(str(out / name) for name in files)}", soft_wrap=True)


class Report(Protocol):
    """What every evaluation ends with."""

    def to_markdown(self) -> str: ...


def print_report(report: Report, as_json: bool) -> None:
    """Print a report as JSON or as text."""
    if as_json:
        console.print_json(report)
    else:
        console.out.print(Markdown(report.to_markdown()))
