"""``blockrag demo``: everything once, on this machine, with nothing to answer and nothing left behind.

A few articles go in first, so that answers are on the screen while the rest is still being read. Each question is asked
twice, without retrieval and with it. The table of times comes last, on a quiet system.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli import console
from blockrag.cli.ask import print_citations
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.documents import describe_warming, show_warming
from blockrag.cli.measured import WITHOUT_KEYS, environment, own_settings, own_system
from blockrag.client import BlockragClient
from blockrag.corpus.sample import Question, articles_path, load_questions
from blockrag.errors import InvalidRequestError
from blockrag.results import Answer, AttentionModeName, Completion, Compression, Retrieved, WarmProgress

_COLLECTION, _OWN_COLLECTION = "almanac", "document"
_ARTICLES_AT_A_TIME = 8
_AS_NEEDED = Compression(rate="auto")
_SHOWN = 3
"""Questions about the almanac whose answers are shown."""
_STAGES = ("retrieve", "plan", "queue", "kv_fetch", "compose", "prefill")
_BUDGET_MB = 1024
"""Of the cache: it holds an eighth of the sample corpus."""
_MEMORY_MB = 64
"""Of the decoder's own memory: less than the table's passages take, so that one row finds them in the store alone."""


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the questions."""

    name: str
    ttft_ms: float
    """Time to first token as the client sees it."""
    prompt_tokens: float
    cached_tokens: float
    cached_share: float
    """Cached part of all prompt tokens."""
    stages_ms: dict[str, float]
    questions: int


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: blockrag demo --json > demo.json")(demo)


def demo(
    settings: SettingsOption = None,
    document: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A document of yours to ask about as well.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="What to ask about it; may be repeated. Default: what it is about.")
    ] = None,
    questions: Annotated[int, typer.Option(min=2, max=100, help="Questions per line of the table.")] = 10,
    top_k: Annotated[int, typer.Option(min=1, max=50, help="Passages per question.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the draw of questions.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Start the system, answer from the sample corpus and a document of yours, print times to first token, stop.

    Every question is asked with retrieval and without, so that one sees what retrieval does.
    """
    with console.errors_to_exit(), tempfile.TemporaryDirectory(prefix="blockrag-demo-") as state_dir:
        if question and document is None:
            raise InvalidRequestError("question", "is asked about a document: name one with --document")
        # An index of its own, where the settings have a server: nothing is left there.
        index = {"threads": 2, "backend": "edge", "replicas": 1}
        loaded = own_settings(
            console.settings_from(settings),
            Path(state_dir),
            _BUDGET_MB,
            decoder={"l1_mb": _MEMORY_MB},
            retriever=index,
            gateway=WITHOUT_KEYS,
        )
        started = time.perf_counter()
        with own_system(loaded) as system:
            console.err.print(f"the services are up at {system.target} ({time.perf_counter() - started:.0f} s)")
            drawn = Random(seed).sample(load_questions(), _SHOWN + questions)
            own = (document, tuple(question or ("What is it about?",))) if document is not None else None
            show = _Show(top_k, quiet=as_json)
            warmed, rows = asyncio.run(_run(system.target, show, drawn[:_SHOWN], own, drawn[_SHOWN:]))
        asked = {"rows": rows, "shown": show.asked, "warmed": warmed, "top_k": top_k, "environment": environment()}
        took = Text(f"the whole demo took {time.perf_counter() - started:.0f} s", "dim")
        console.answer(as_json, asked, _table(rows), took)


@dataclass(frozen=True)
class Shown:
    """A question with its two answers."""

    question: str
    without_retrieval: str
    with_retrieval: str
    expected: tuple[str, ...] = ()


class _Show:
    """Asks questions for people to watch."""

    def __init__(self, top_k: int, *, quiet: bool) -> None:
        self.top_k = top_k
        self.asked: list[Shown] = []
        self._quiet = quiet

    async def ask(self, client: BlockragClient, question: str, collection: str, expected: tuple[str, ...] = ()) -> None:
        alone = await client.ask(question, collection=collection, attention_mode="none")
        if not self._quiet:
            known = f"  (right: {' / '.join(expected)})" if expected else ""
            console.out.print(Text.assemble("\n", (question, "bold"), (known, "dim")))
            line = Text.assemble("  without retrieval: ", (alone.text.strip(), "dim"), "\n  with retrieval:    ")
            console.out.print(line, end="")
        text = ""
        async for event in client.generate(question, collection=collection, top_k=self.top_k, compression=_AS_NEEDED):
            if isinstance(event, Completion):
                if not self._quiet:
                    console.out.print()
                    print_citations(event)
            elif not isinstance(event, Retrieved):
                text += event
                if not self._quiet:
                    console.out.print(event, end="", highlight=False)
        self.asked.append(Shown(question, alone.text, text, expected))


async def _run(
    target: str,
    show: _Show,
    first: Sequence[Question],
    own: tuple[Path, tuple[str, ...]] | None,
    timed: Sequence[Question],
) -> tuple[WarmProgress, list[Row]]:
    async with BlockragClient(target) as client:
        early, late = _articles({question.article for question in first})
        await _ingest(client, early)
        for question in first:
            await show.ask(client, question.question, _COLLECTION, question.answers)
        if own is not None:
            await client.ingest_file(own[0], collection=_OWN_COLLECTION)
            for text in own[1]:
                await show.ask(client, text, _OWN_COLLECTION)
        stored = await _ingest(client, late)
        warmed = await show_warming(client.warm(collection=_COLLECTION))
        console.err.print(
            f"ingested {len(early) + len(late)} articles, the rest in {stored:.0f} s; {describe_warming(warmed)}"
            + ("" if warmed.done == warmed.total else ": the cache is full")
        )
        answers: dict[str, list[Answer]] = {"block, first time": []}
        for question in timed:
            answers["block, first time"].append(await _ask(client, question, "block", show.top_k))
        kinds: tuple[tuple[str, AttentionModeName], ...] = (
            ("no retrieval", "none"),
            ("full attention", "full"),
            ("block, from the store", "block"),
            ("block, from memory", "block"),
        )
        # The decoder's memory holds less than all these questions' passages: each finds its own in the store first.
        for question in timed:
            for name, mode in kinds:
                answers.setdefault(name, []).append(await _ask(client, question, mode, show.top_k))
        order = ("no retrieval", "full attention", *(name for name in answers if name.startswith("block")))
        return warmed, [_row(name, answers[name]) for name in order]


def _articles(first: set[str]) -> tuple[list[bytes], list[bytes]]:
    """The sample corpus' lines: those of the articles named, and the rest."""
    lines = gzip.decompress(articles_path().read_bytes()).splitlines(keepends=True)
    early = [line for line in lines if json.loads(line)["id"] in first]
    chosen = set(early)
    return early, [line for line in lines if line not in chosen]


async def _ingest(client: BlockragClient, lines: Sequence[bytes]) -> float:
    """Stores articles; gives the seconds it took."""
    started = time.perf_counter()
    with console.progress_bar() as bar:
        task = bar.add_task("ingesting articles", total=len(lines))
        for start in range(0, len(lines), _ARTICLES_AT_A_TIME):
            part = lines[start : start + _ARTICLES_AT_A_TIME]
            name = f"almanac-{len(lines)}-{start}.jsonl"
            await client.ingest_bytes(name, b"".join(part), collection=_COLLECTION, media_type="application/jsonl")
            bar.advance(task, len(part))
    return time.perf_counter() - started


async def _ask(client: BlockragClient, question: Question, mode: AttentionModeName, top_k: int) -> Answer:
    return await client.ask(question.question, collection=_COLLECTION, top_k=top_k, attention_mode=mode)


def _row(name: str, answers: Sequence[Answer]) -> Row:
    from blockrag.evaluation.ttft_grpc import first_token_ms

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    usages = [answer.completion.usage for answer in answers]
    prompt, cached = sum(usage.prompt_tokens for usage in usages), sum(usage.cached_tokens for usage in usages)
    return Row(
        name=name,
        ttft_ms=median([first_token_ms(answer) for answer in answers]),
        prompt_tokens=median([usage.prompt_tokens for usage in usages]),
        cached_tokens=median([usage.cached_tokens for usage in usages]),
        cached_share=round(cached / prompt, 4) if prompt else 0.0,
        stages_ms={
            stage: median([answer.completion.stages_ms.get(stage, 0.0) for answer in answers]) for stage in _STAGES
        },
        questions=len(answers),
    )


def _table(rows: Sequence[Row]) -> Table:
    table = Table("ms (share)", *(row.name for row in rows), title="Over gRPC, medians")
    table.add_row("first token", *(Text(f"{row.ttft_ms:.1f}", "bold") for row in rows))
    for stage in _STAGES:
        values = [(row.stages_ms[stage], row.ttft_ms) for row in rows]
        table.add_row(stage, *(f"{value:.1f} ({value / whole:.0%})" if whole else "–" for value, whole in values))
    table.add_section()
    table.add_row("prompt tokens", *(f"{row.prompt_tokens:.0f}" for row in rows))
    table.add_row("found in a cache", *(f"{row.cached_share:.0%}" for row in rows))
    return table
