"""What the commands of ``blockrag eval`` share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from blockrag.cli import console
from blockrag.errors import SetupError

DataOption = Annotated[
    Path, typer.Option(help="Questions (JSONL, may be gzipped), or a directory with dev/wiki_pattern_qa.jsonl.gz.")
]
QuestionsOption = Annotated[int, typer.Option(min=1, help="How many questions to draw.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the draw and of the intervals.")]


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
    from blockrag.evaluation.writing import write_together

    write_together(out, files)
    console.err.print(f"written: {', '.join(str(out / name) for name in files)}", markup=False, soft_wrap=True)
