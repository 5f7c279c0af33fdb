"""``blockrag eval``: how good the answers are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blockrag.cli import console
from blockrag.cli.connection import Connection
from blockrag.cli.console import JsonOption
from blockrag.cli.evaluate_experiments import compression, qa
from blockrag.cli.evaluate_retrieval import retrieval
from blockrag.cli.options import command_of
from blockrag.client import BlockragClient
from blockrag.client_options import GenerateOptions
from blockrag.results import Passage

if TYPE_CHECKING:
    from blockrag.corpus.sample import Question
    from blockrag.evaluation.almanac import AlmanacScores, Mode
    from blockrag.evaluation.intervals import Interval

app = typer.Typer(no_args_is_help=True, help="Evaluate the reader and the whole path.")


app.command(epilog="Example: blockrag eval qa --data dev/xquad_en.jsonl.gz --passages 5 --out results/xquad")(qa)
app.command(epilog="Example: blockrag eval retrieval --data dev/xquad_en.jsonl.gz --out results/xquad")(retrieval)

app.command(epilog="Example: blockrag eval compression --data data --text data/dev/books.jsonl.gz --out results/rates")(
    compression
)


@app.command(epilog="Example: blockrag up && blockrag ingest --almanac && blockrag eval almanac --json")
@command_of(Connection, last=True)
def almanac(
    connection: Connection,
    collection: Annotated[str, typer.Option(help="Collection that holds the almanac.")] = "almanac",
    top_k: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 5,
    max_context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most passage tokens in the prompt; the rest is retrieved and dropped.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Ask only the first so many questions; 0: all.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Questions in flight.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Ask the almanac's questions over gRPC, through retrieval, in every attention mode."""
    from blockrag.corpus.sample import load_questions
    from blockrag.evaluation.environment import describe_environment

    questions = load_questions()
    questions = questions[:limit] if limit else questions
    budget = GenerateOptions(max_context_tokens=max_context_tokens) if max_context_tokens else GenerateOptions()
    with console.progress_bar() as bar:
        tasks = {mode: bar.add_task(mode, total=len(questions)) for mode in ("block", "full", "none")}
        scores = asyncio.run(
            _ask_almanac(
                connection.client(),
                questions,
                GenerateOptions(collection=collection, top_k=top_k, **budget),
                concurrency,
                lambda mode, done: bar.update(tasks[mode], completed=done),
            )
        )
    if as_json:
        result = {"scores": scores.to_dict(), "top_k": top_k, "max_context_tokens": max_context_tokens}
        console.print_json({**result, "environment": describe_environment()})
        return
    table = Table("mode", f"recall@{scores.recall_at}", "exact match", "F1", "failed")
    for row in scores.modes:
        recall = "–" if row.recall is None else _interval(row.recall)
        table.add_row(row.mode, recall, _interval(row.exact_match), _interval(row.f1), str(row.failed))
    console.out.print(table)


async def _ask_almanac(
    client: BlockragClient,
    questions: list[Question],
    options: GenerateOptions,
    concurrency: int,
    progress: Callable[[Mode, int], None],
) -> AlmanacScores:
    from blockrag.evaluation.almanac import evaluate_almanac

    async with client:

        async def ask(question: str, mode: Mode) -> tuple[str, Sequence[Passage]]:
            chosen: GenerateOptions = {**options, "attention_mode": mode}
            answer = await client.ask(question, **chosen)
            return answer.text, answer.passages

        return await evaluate_almanac(questions, ask, concurrency=concurrency, progress=progress)


def _interval(value: Interval) -> str:
    return f"{value.mean:.1%} ({value.low:.1%} to {value.high:.1%})"
