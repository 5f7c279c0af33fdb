"""``blockrag eval compression``: what compression costs and what the choice of chunks is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blockrag.cli import console
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.evaluate_options import (
    BundleOption,
    ComputeTypeOption,
    KvTypeOption,
    SeedOption,
    measured_settings,
    print_report,
    shown_progress,
    write_results,
)
from blockrag.errors import SetupError

if TYPE_CHECKING:
    from blockrag.evaluation.compression import CompressionRun


def compression(
    data: Annotated[
        Path | None, typer.Option(help="Questions (JSONL, may be gzipped), or a directory with dev/ and train/.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Long texts (JSONL, may be gzipped) whose paragraphs are predicted.")
    ] = None,
    settings: SettingsOption = None,
    bundle: BundleOption = None,
    rates: Annotated[
        str, typer.Option(help="Tokens per slot, separated by commas; default: 1, k/4, k/2, 3k/4, k of the bundle.")
    ] = "",
    selectors: Annotated[
        str, typer.Option(help="Who chooses what is expanded, separated by commas; default: all.")
    ] = "",
    reencode: Annotated[
        float | None, typer.Option(min=0, help="Rate at which composed is compared with re-encoded; 0: not at all.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many questions to draw.")] = 300,
    passages: Annotated[int, typer.Option(min=1, max=100, help="Passages per question.")] = 10,
    paragraphs: Annotated[int, typer.Option(min=1, help="How many paragraphs to predict.")] = 200,
    context: Annotated[int, typer.Option(min=1, max=100, help="Passages before each of these.")] = 10,
    distractors: Annotated[
        Literal["auto", "same", "bm25", "dense", "random"],
        typer.Option(help="Passages beside the right one; auto: of the same kind where the data knows, else bm25."),
    ] = "auto",
    seed: SeedOption = 0,
    max_answer_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Longest answer.")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compute_dtype: ComputeTypeOption = None,
    kv_dtype: KvTypeOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for compression.json, compression.md, compression.png, answers.jsonl."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask questions and predict paragraphs at several rates, with every way to choose what stays word for word."""
    from blockrag.evaluation.compression import CompressionOptions, run_compression
    from blockrag.evaluation.compression_text import TextOptions

    with console.errors_to_exit():
        if out is not None:
            _check_plots()
        options = CompressionOptions(
            settings=measured_settings(settings, bundle, compute_dtype, kv_dtype),
            data=data,
            text=TextOptions(text, paragraphs, context, seed) if text is not None else None,
            rates=_parse_rates(rates),
            selectors=tuple(name.strip() for name in selectors.split(",") if name.strip()),
            reencode=reencode,
            questions=questions,
            passages=passages,
            distractors=None if distractors == "auto" else distractors,
            seed=seed,
            max_answer_tokens=max_answer_tokens,
            device=device,
        )
        with shown_progress() as (progress, status):
            run = run_compression(options, progress, status)
        if out is not None:
            _write(run, out)
        print_report(run.report, as_json)


def _parse_rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",") if part.strip()}))
    except ValueError as error:
        raise SetupError(f"--rates {text!r}: write numbers separated by commas") from error


def _check_plots() -> None:
    from blockrag.evaluation.plots import load_figure

    load_figure()


def _write(run: CompressionRun, out: Path) -> None:
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
    write_results(out, files)
