"""``blockrag eval qa``: questions with passages, without retrieval, mode by mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blockrag.cli import console
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.evaluate_options import (
    BundleOption,
    ComputeTypeOption,
    DataOption,
    KvTypeOption,
    QuestionsOption,
    SeedOption,
    measured_settings,
    parse_numbers,
    print_report,
    shown_progress,
    write_results,
)
from blockrag.errors import SetupError

if TYPE_CHECKING:
    from blockrag.evaluation.answering import Mode
    from blockrag.evaluation.qa import QaRun

_PASSAGES_LIMIT = 100


def qa(
    data: DataOption,
    settings: SettingsOption = None,
    bundle: BundleOption = None,
    compare: Annotated[Path | None, typer.Option(help="A second bundle, asked the same.")] = None,
    without_pear: Annotated[
        bool, typer.Option("--without-pear", help="Ask also with the bundle's PEAR coefficients left out.")
    ] = False,
    questions: QuestionsOption = 1000,
    passages: Annotated[int, typer.Option(min=1, max=_PASSAGES_LIMIT, help="Passages per question.")] = 10,
    distractors: Annotated[
        Literal["auto", "same", "bm25", "dense", "random"],
        typer.Option(help="Passages beside the right one; auto: of the same kind where the data knows, else bm25."),
    ] = "auto",
    modes: Annotated[
        str, typer.Option(help="Of full, block, no-reencoding, none; separated by commas.")
    ] = "full,block",
    counts: Annotated[str, typer.Option(help="Further numbers of passages, e.g. 1,5,20.")] = "",
    places: Annotated[
        int, typer.Option(min=0, max=_PASSAGES_LIMIT, help="Places of the right passage to compare; 0: none.")
    ] = 0,
    absent: Annotated[bool, typer.Option(help="Ask also with the right passage left out.")] = True,
    seed: SeedOption = 0,
    max_answer_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Longest answer.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compute_dtype: ComputeTypeOption = None,
    kv_dtype: KvTypeOption = None,
    out: Annotated[Path | None, typer.Option(help="Directory for qa.json, qa.md, answers.jsonl, places.png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask questions with the right passage among others, and score every mode on the same questions."""
    from blockrag.evaluation.qa import QaOptions, run_qa

    with console.errors_to_exit():
        if out is not None and places:
            _check_plots()
        options = QaOptions(
            settings=measured_settings(settings, bundle, compute_dtype, kv_dtype),
            data=data,
            compare=compare,
            without_pear=without_pear,
            questions=questions,
            passages=passages,
            distractors=None if distractors == "auto" else distractors,
            modes=_chosen_modes(modes),
            counts=parse_numbers(counts, "--counts", most=_PASSAGES_LIMIT),
            places=places,
            absent=absent,
            seed=seed,
            max_answer_tokens=max_answer_tokens,
            device=device,
        )
        with shown_progress() as (progress, status):
            run = run_qa(options, progress, status)
        if out is not None:
            _write(run, out)
        print_report(run.report, as_json)


def _chosen_modes(text: str) -> tuple[Mode, ...]:
    from blockrag.evaluation.answering import MODES

    chosen = [mode.strip() for mode in text.split(",") if mode.strip()]
    unknown = [mode for mode in chosen if mode not in MODES]
    if unknown or not chosen:
        raise SetupError(f"--modes: {', '.join(unknown) or 'none given'}; choose of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in chosen)


def _check_plots() -> None:
    from blockrag.evaluation.plots import load_figure

    load_figure()


def _write(run: QaRun, out: Path) -> None:
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
    write_results(out, files)
