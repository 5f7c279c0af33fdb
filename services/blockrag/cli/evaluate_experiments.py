"""``blockrag eval qa | compression``: experiments on questions, whose options are fields of ``evaluation.options``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from blockrag.cli import console
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.evaluate_options import (
    BundleOption,
    ComputeTypeOption,
    DataOption,
    KvTypeOption,
    measured_settings,
    parse_numbers,
    print_report,
    write_results,
)
from blockrag.cli.options import command_of
from blockrag.errors import SetupError
from blockrag.evaluation.options import MODES, MOST_PASSAGES, CompressionOptions, Mode, QaOptions

if TYPE_CHECKING:
    from blockrag.evaluation.compression import CompressionRun
    from blockrag.evaluation.qa import QaRun

Options = TypeVar("Options")


@command_of(QaOptions, left_out=["settings"])
def qa(
    options: QaOptions,
    data: DataOption,
    modes: Annotated[
        str, typer.Option(help="Of full, block, no-reencoding, none; separated by commas.")
    ] = "full,block",
    counts: Annotated[str, typer.Option(help="Further numbers of passages, e.g. 1,5,20.")] = "",
    settings: SettingsOption = None,
    bundle: BundleOption = None,
    compute_dtype: ComputeTypeOption = None,
    kv_dtype: KvTypeOption = None,
    out: Annotated[Path | None, typer.Option(help="Directory for qa.json, qa.md, answers.jsonl, places.png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask questions with the right passage among others, and score every mode on the same questions."""
    from blockrag.evaluation.qa import run_qa

    options = replace(
        options,
        settings=measured_settings(settings, bundle, compute_dtype, kv_dtype),
        data=data,
        modes=_chosen_modes(modes),
        counts=parse_numbers(counts, "--counts", most=MOST_PASSAGES),
    )
    _measure(run_qa, options, _qa_files, out, as_json, draws=options.places > 0)


@command_of(CompressionOptions, left_out=["settings"])
def compression(
    options: CompressionOptions,
    rates: Annotated[
        str, typer.Option(help="Tokens per slot, separated by commas; default: 1, k/4, k/2, 3k/4, k of the bundle.")
    ] = "",
    selectors: Annotated[
        str, typer.Option(help="Who chooses what is expanded, separated by commas; default: all.")
    ] = "",
    settings: SettingsOption = None,
    bundle: BundleOption = None,
    compute_dtype: ComputeTypeOption = None,
    kv_dtype: KvTypeOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for compression.json, compression.md, compression.png, answers.jsonl."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask questions and predict paragraphs at several rates, with every way to choose what stays word for word."""
    from blockrag.evaluation.compression import run_compression

    options = replace(
        options,
        settings=measured_settings(settings, bundle, compute_dtype, kv_dtype),
        rates=_parse_rates(rates),
        selectors=_names(selectors),
    )
    _measure(run_compression, options, _compression_files, out, as_json, draws=True)


def _measure(
    run: Callable[[Options, Callable[[int, int], None], Callable[[str], None]], Any],
    options: Options,
    files: Callable[[Any], Mapping[str, bytes]],
    out: Path | None,
    as_json: bool,
    *,
    draws: bool,
) -> None:
    """Runs it under a bar, writes its files to ``out`` and prints its report."""
    if out is not None and draws:
        from blockrag.evaluation.plots import load_figure

        load_figure()  # before hours of work, not after
    with console.progress_bar() as bar:
        task = bar.add_task("", total=None)
        found = run(
            options,
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda what: bar.update(task, description=what),
        )
    if out is not None:
        write_results(out, files(found))
    print_report(found.report, as_json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _chosen_modes(text: str) -> tuple[Mode, ...]:
    chosen = _names(text)
    unknown = [mode for mode in chosen if mode not in MODES]
    if unknown or not chosen:
        raise SetupError(f"--modes: {', '.join(unknown) or 'none given'}; choose of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in chosen)


def _parse_rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in _names(text)}))
    except ValueError as error:
        raise SetupError(f"--rates {text!r}: write numbers separated by commas") from error


def _qa_files(run: QaRun) -> dict[str, bytes]:
    from blockrag.evaluation.plots import plot_places
    from blockrag.evaluation.report import answer_lines

    outputs = {f"{cell.label}, {cell.condition.label}": found for cell, found in run.answers.items()}
    files = {
        "qa.json": run.report.to_json().encode(),
        "qa.md": run.report.to_markdown().encode(),
        "answers.jsonl": answer_lines(run.questions, {"outputs": outputs}).encode(),
    }
    if any(score.place is not None for score in run.report.results.scores):
        files["places.png"] = plot_places(run.report)
    return files


def _compression_files(run: CompressionRun) -> dict[str, bytes]:
    from blockrag.evaluation.plots import plot_compression
    from blockrag.evaluation.report import answer_lines

    files = {
        "compression.json": run.report.to_json().encode(),
        "compression.md": run.report.to_markdown().encode(),
        "compression.png": plot_compression(run.report),
    }
    if run.questions:
        cells = {f"{cell.rate:g}, {cell.label}": found for cell, found in run.answers.items()}
        columns = {
            "outputs": {label: found.outputs for label, found in cells.items()},
            "slots": {label: found.slots.tolist() for label, found in cells.items()},
        }
        files["answers.jsonl"] = answer_lines(run.questions, columns).encode()
    return files
