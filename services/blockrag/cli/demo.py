"""``blockrag demo``: everything once, on this machine, with nothing to answer and nothing left behind."""

from __future__ import annotations

import asyncio
import gzip
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

from blockrag.cli import console
from blockrag.cli.ask import print_citations
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.documents import show_warming
from blockrag.client import BlockragClient
from blockrag.corpus.sample import Question, articles_path, load_questions
from blockrag.local import LocalSystem
from blockrag.local.preflight import free_port
from blockrag.results import Answer, AttentionModeName, Completion, Retrieved
from blockrag.settings import Settings

_COLLECTION = "almanac"
_ARTICLES_AT_A_TIME = 8
_STAGES = ("retrieve", "plan", "queue", "kv_fetch", "compose", "prefill")
_BUDGET_MB = 1536


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
    questions: Annotated[int, typer.Option(min=2, max=100, help="Questions per line of the table.")] = 20,
    top_k: Annotated[int, typer.Option(min=1, max=50, help="Passages per question.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the draw of questions.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Start the system, ingest and warm the sample corpus, ask over gRPC, print times to first token, stop."""
    with console.errors_to_exit(), tempfile.TemporaryDirectory(prefix="blockrag-demo-") as state_dir:
        loaded = _demo_settings(console.settings_from(settings), Path(state_dir))
        started = time.perf_counter()
        with console.err.status("starting") as line:
            system = LocalSystem.start(loaded, on_progress=line.update, owned=True)
        with system:
            console.err.print(f"six services are up at {system.target} ({time.perf_counter() - started:.0f} s)")
            drawn = Random(seed).sample(load_questions(), 2 * questions)
            rows = asyncio.run(_run(system.target, drawn[:questions], drawn[questions:], top_k, as_json))
        if as_json:
            from blockrag.evaluation.environment import describe_environment

            console.print_json({"rows": rows, "top_k": top_k, "environment": describe_environment()})
        else:
            console.out.print(_table(rows))
            console.out.print(f"[dim]the whole demo took {time.perf_counter() - started:.0f} s[/]")


def _demo_settings(settings: Settings, state_dir: Path) -> Settings:
    """Own ports and folder, and a cache that holds the whole sample corpus."""
    cluster = settings.cluster.model_copy(
        update={
            "state_dir": str(state_dir),
            "grpc_port": free_port(),
            "http_port": free_port(),
            "object_store_mb": max(settings.cluster.object_store_mb, _BUDGET_MB * 3 // 2),
        }
    )
    return settings.model_copy(
        update={
            "cluster": cluster,
            "kv_cache": settings.kv_cache.model_copy(update={"budget_mb": _BUDGET_MB}),
            "retriever": settings.retriever.model_copy(update={"threads": 2}),
        }
    )


async def _run(target: str, cold: Sequence[Question], warm: Sequence[Question], top_k: int, as_json: bool) -> list[Row]:
    async with BlockragClient(target) as client:
        await _ingest(client)
        # Loads code paths and thread pools of every service; of passages that no row of the table asks for.
        for mode in ("none", "full", "block"):
            await client.ask("What is an almanac?", collection=_COLLECTION, top_k=1, attention_mode=mode)
        answers: dict[str, list[Answer]] = {"block, cold": []}
        for question in cold:
            answers["block, cold"].append(await _ask(client, question, "block", top_k))
        warmed = await show_warming(client.warm(collection=_COLLECTION))
        console.err.print(f"warmed {warmed.total} passages: {warmed.encoded_bytes / 2**20:.0f} MiB of attention state")
        if not as_json:
            for question in warm[:5]:
                await _stream(client, question, top_k)
        kinds: tuple[tuple[str, AttentionModeName], ...] = (
            ("no retrieval", "none"),
            ("full attention", "full"),
            ("block, from the store", "block"),
            ("block, from memory", "block"),
        )
        # The streamed questions are in the decoder's memory already: the others come first from the object store.
        for question in warm[5:]:
            for name, mode in kinds:
                answers.setdefault(name, []).append(await _ask(client, question, mode, top_k))
        order = ("no retrieval", "full attention", "block, cold", *(name for name, mode in kinds if mode == "block"))
        return [_row(name, answers[name]) for name in order]


async def _ingest(client: BlockragClient) -> None:
    lines = gzip.decompress(articles_path().read_bytes()).splitlines(keepends=True)
    passages = 0
    with console.progress_bar() as bar:
        task = bar.add_task("ingesting articles", total=len(lines))
        for start in range(0, len(lines), _ARTICLES_AT_A_TIME):
            part = lines[start : start + _ARTICLES_AT_A_TIME]
            stored = await client.ingest_bytes(
                f"almanac-{start}.jsonl", b"".join(part), collection=_COLLECTION, media_type="application/jsonl"
            )
            passages += sum(document.passages for document in stored)
            bar.advance(task, len(part))
    console.err.print(f"ingested {len(lines)} articles, {passages} passages")


async def _ask(client: BlockragClient, question: Question, mode: AttentionModeName, top_k: int) -> Answer:
    return await client.ask(question.question, collection=_COLLECTION, top_k=top_k, attention_mode=mode)


async def _stream(client: BlockragClient, question: Question, top_k: int) -> None:
    console.out.print(f"\n[bold]{question.question}[/]  [dim](answer: {' / '.join(question.answers)})[/]")
    async for event in client.generate(question.question, collection=_COLLECTION, top_k=top_k):
        if isinstance(event, Completion):
            console.out.print()
            print_citations(event)
        elif not isinstance(event, Retrieved):
            console.out.print(event, end="", markup=False, highlight=False)


def _row(name: str, answers: Sequence[Answer]) -> Row:
    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    usages = [answer.completion.usage for answer in answers]
    prompt, cached = sum(usage.prompt_tokens for usage in usages), sum(usage.cached_tokens for usage in usages)
    return Row(
        name=name,
        ttft_ms=median([answer.client_time_to_first_token_ms for answer in answers]),
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
    table.add_row("first token", *(f"[bold]{row.ttft_ms:.1f}[/]" for row in rows))
    for stage in _STAGES:
        values = [(row.stages_ms[stage], row.ttft_ms) for row in rows]
        table.add_row(stage, *(f"{value:.1f} ({value / whole:.0%})" if whole else "–" for value, whole in values))
    table.add_section()
    table.add_row("prompt tokens", *(f"{row.prompt_tokens:.0f}" for row in rows))
    table.add_row("found in a cache", *(f"{row.cached_share:.0%}" for row in rows))
    return table
