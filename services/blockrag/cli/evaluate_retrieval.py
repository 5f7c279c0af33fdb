"""``blockrag eval retrieval``: what dense search, BM25 and both fused find."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from blockrag.cli import console
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.evaluate_options import (
    DataOption,
    QuestionsOption,
    SeedOption,
    parse_numbers,
    print_report,
    write_results,
)
from blockrag.errors import SetupError


def retrieval(
    data: DataOption,
    settings: SettingsOption = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that passages are split for; default: the one that ships with blockrag.")
    ] = None,
    questions: QuestionsOption = 1000,
    at: Annotated[str, typer.Option(help="Numbers of results to score, separated by commas.")] = "1,5,10,20",
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for retrieval.json and retrieval.md.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Index a file's passages as serving does, search for its questions, and score the ranks of the right ones."""
    with console.errors_to_exit():
        wanted = parse_numbers(at, "--at", most=1000)
        if not wanted:
            raise SetupError("--at: name at least one number of results")
        retriever = console.settings_from(settings).retriever
        from blockrag.evaluation.retrieval import RetrievalOptions, evaluate_retrieval
        from blockrag.modeling.bundle import DEFAULT_BUNDLE

        options = RetrievalOptions(data, bundle or DEFAULT_BUNDLE, retriever, questions, wanted, seed)
        with console.progress_bar() as bar:
            task = bar.add_task("reading the questions", total=None)
            report = asyncio.run(
                evaluate_retrieval(
                    options,
                    lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
                )
            )
        if out is not None:
            files = {"retrieval.json": report.to_json().encode(), "retrieval.md": report.to_markdown().encode()}
            write_results(out, files)
        print_report(report, as_json)
