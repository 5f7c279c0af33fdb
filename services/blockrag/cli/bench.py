"""``blockrag bench``: how fast."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli import console
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.measured import (
    WITHOUT_KEYS,
    as_bytes,
    counted,
    environment,
    own_settings,
    own_system,
    parse_numbers,
    write_results,
)
from blockrag.errors import SetupError
from blockrag.settings import Settings

if TYPE_CHECKING:
    from blockrag.evaluation.peers.rounds import PeerRow
    from blockrag.evaluation.ttft_grpc import GrpcSample, ReportRow


_LONGEST = 10**6


def peers(
    contexts: Annotated[str, typer.Option(help="Passage tokens of one stream, comma separated.")] = "512,2048,7900",
    streams: Annotated[int, typer.Option(min=1, max=64, help="Streams of the second measurement; 1: none.")] = 8,
    stream_contexts: Annotated[str, typer.Option(help="Passage tokens of each of several streams.")] = "512",
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the passages, always new.")] = 50,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each, interleaved.")] = 3,
    llama: Annotated[
        Path | None,
        typer.Option(help="Folder of node-llama-cpp, as npm installs it; left out, llama.cpp's rows say how to."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="llama.cpp's model; default: the GGUF file of the base.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for peers.json and peers.png.")] = None,
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The same weights, prompts, threads and machine: blockrag, stock transformers and llama.cpp, interleaved.

    Each is a process of its own; the services between them and a client are not measured here. On a machine that does
    other work compare within a run only.
    """
    from blockrag.configured import configured_bundle
    from blockrag.evaluation.peers.rounds import PeerTask, all_peers, measure_peers
    from blockrag.evaluation.plots import load_figure, plot_peers

    with console.errors_to_exit():
        if out is not None:
            load_figure()
        loaded = console.settings_from(settings)
        bundle = configured_bundle(loaded)
        tasks = [PeerTask(size, 1) for size in parse_numbers(contexts, "--contexts", _LONGEST)]
        if streams > 1:
            sizes = parse_numbers(stream_contexts, "--stream-contexts", _LONGEST)
            tasks += [PeerTask(size, streams) for size in sizes]
        if not tasks:
            raise SetupError("nothing to measure: name --contexts or --stream-contexts")
        longest = max(task.context_tokens for task in tasks) + question_tokens + new_tokens
        if longest > bundle.max_context_tokens:
            raise SetupError(f"{longest} tokens, where the bundle has {bundle.max_context_tokens}")
        with tempfile.TemporaryDirectory(prefix="blockrag-peers-") as folder, counted("rounds") as tell:
            rows = measure_peers(
                all_peers(bundle, loaded, llama, gguf, Path(folder)),
                tasks,
                block_tokens=bundle.passage_tokens,
                vocabulary=bundle.vocab_size,
                question_tokens=question_tokens,
                new_tokens=new_tokens,
                repeats=repeats,
                progress=tell,
            )
        place = environment()
        result = {
            "rows": [asdict(row) for row in rows],
            "threads": loaded.decoder.threads,
            "question_tokens": question_tokens,
            "new_tokens": new_tokens,
            "environment": place,
        }
        if out is not None:
            title = f"{place['cores']} × {place['cpu']}, {loaded.decoder.threads} threads"
            write_results(out, {"peers.json": as_bytes(result), "peers.png": plot_peers(rows, title)})
        console.answer(as_json, result, _peer_table(rows))


def _peer_table(rows: list[PeerRow]) -> Table:
    from blockrag.evaluation.peers.rounds import STATES

    table = Table("", "passage tokens", "streams", "first token, ms", "ms a token", "memory, MiB", "")
    shown = ""
    for row in rows:
        if row.peer != shown:
            table.add_section()
            table.add_row(Text(row.peer, "bold"), "", "", "", "", "", "" if row.state else row.note)
            shown = row.peer
        if row.state:
            numbers = [
                "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
                for value in (row.first_ms, row.token_ms)
            ]
            where = (f"{row.context_tokens}", f"{row.streams}")
            table.add_row(f"  {STATES[row.state]}", *where, *numbers, f"{row.memory_mb or '–'}", row.note)
    return table


app = typer.Typer(no_args_is_help=True, help="Measure.")

app.command(epilog="Example: blockrag bench peers --llama node_modules/node-llama-cpp --out out/peers")(peers)

_L1_MB = 256
"""Holds the largest default context and not two of them, so that one displaces the other."""
_BUDGET_MB = 1536
"""Holds all default contexts beside what cold repeats leave behind."""


@app.command(epilog="Example: blockrag bench ttft --contexts 512,2048 --repeats 30 --out out/bench")
def ttft(
    contexts: Annotated[str, typer.Option(help="Passage tokens, comma separated.")] = "512,1024,2048,4096,7680",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each, interleaved.")] = 5,
    model: Annotated[bool, typer.Option(help="Measure the model alone.")] = True,
    grpc: Annotated[bool, typer.Option(help="Measure over gRPC, on a system started for it.")] = True,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Model alone: time compression with chunks of this size; default: the bundle's."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for ttft.json and ttft.png.")] = None,
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time to first token over the context's size.

    No retrieval, full attention, block attention cold and warm, everything compressed, and mixtures at rates 4, 8, 16.
    """
    from blockrag.configured import configured_bundle, configured_device
    from blockrag.evaluation.plots import plot_rows
    from blockrag.evaluation.ttft_grpc import rate_notes
    from blockrag.evaluation.ttft_model import measure_model_ttft

    with console.errors_to_exit():
        loaded = console.settings_from(settings)
        sizes = parse_numbers(contexts, "--contexts", most=10**6, least=128)
        if not sizes:
            raise SetupError("--contexts: name at least one size")
        rows: list[ReportRow] = []
        overhead: dict[str, float] = {}
        stages: dict[str, dict[str, float]] = {}
        notes: list[str] = []
        if model:
            bundle = configured_bundle(loaded)
            chunk = chunk_tokens or bundle.chunk_tokens
            notes = rate_notes(chunk)
            if bundle.refrag is None or chunk != bundle.chunk_tokens:
                notes.append(f"compressed blocks of {chunk} tokens a chunk are random: for timing only")
            with counted("model alone") as tell:
                rows += measure_model_ttft(
                    bundle,
                    loaded,
                    contexts=sizes,
                    repeats=repeats,
                    chunk_tokens=chunk,
                    device=configured_device(loaded),
                    progress=tell,
                )
        if grpc:
            samples = _measure_grpc(loaded, sizes, repeats)
            rows += _grpc_rows(samples)
            overhead, stages = _overhead(samples), _stages(samples)
        place = environment()
        result = {
            "rows": [asdict(row) for row in rows],
            "notes": notes,
            "grpc_overhead_ms": overhead,
            "grpc_stages_ms": stages,
            "settings": loaded.model_dump(mode="json", include={"bundle", "decoder", "encoder"}),
            "environment": place,
        }
        if out is not None:
            picture = plot_rows(rows, f"{place['cores']} × {place['cpu']}, {place['commit']}")
            write_results(out, {"ttft.json": as_bytes(result), "ttft.png": picture})
        shown = [
            _table(rows, sizes, "Time to first token, ms: median (× no retrieval)", _timed),
            _table(rows, sizes, "Slots of the passages (MB of K and V moved)", _moved),
            *notes,
        ]
        if overhead:
            text = ", ".join(f"{state} {value:.1f}" for state, value in overhead.items())
            shown.append(f"first token over gRPC minus model time, median ms: {text}")
        console.answer(as_json, result, *shown)


@app.command(epilog="Example: blockrag bench plan --passages 20 --rate 4")
def plan(
    passages: Annotated[int, typer.Option(min=1, max=200, help="Passages of the plan.")] = 20,
    rate: Annotated[float, typer.Option(min=1, help="Passage tokens per slot.")] = 4.0,
    repeats: Annotated[int, typer.Option(min=1, help="Plans by each policy, interleaved.")] = 100,
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a plan takes beside the call to the compressor, by policy, for passages that it saw before."""
    from blockrag.configured import configured_bundle
    from blockrag.evaluation.plan_time import measure_plans
    from blockrag.evaluation.ttft_grpc import first_passages

    with console.errors_to_exit():
        loaded = console.settings_from(settings)
        bundle = configured_bundle(loaded)
        given = first_passages(bundle, passages)
        with counted("plans") as tell:
            times = asyncio.run(measure_plans(bundle, loaded, given, rate=rate, repeats=repeats, on_progress=tell))
        title = f"Plan of {passages} passages ({times[0].chunks} chunks) at rate {rate:g}, ms"
        table = Table("policy", "median", "p90", "of it the policy", title=title)
        for row in times:
            table.add_row(row.policy, f"{row.median_ms:.2f}", f"{row.p90_ms:.2f}", f"{row.policy_ms:.2f}")
        console.answer(as_json, {"rows": times, "rate": rate, "environment": environment()}, table)


def _measure_grpc(settings: Settings, sizes: tuple[int, ...], repeats: int) -> list[GrpcSample]:
    from blockrag.client import BlockragClient
    from blockrag.configured import configured_bundle
    from blockrag.evaluation.ttft_grpc import make_workload, measure_grpc_ttft

    bundle = configured_bundle(settings)
    workload = make_workload(bundle, sizes)
    chunk_tokens = bundle.chunk_tokens if bundle.refrag is not None else None

    async def measure(target: str) -> list[GrpcSample]:
        with counted("over gRPC") as tell:
            async with BlockragClient(target) as client:
                return await measure_grpc_ttft(
                    client, workload, chunk_tokens=chunk_tokens, repeats=repeats, on_progress=tell
                )

    with tempfile.TemporaryDirectory(prefix="blockrag-bench-") as folder:
        limits = {**WITHOUT_KEYS, "max_top_k": 1000}
        own = own_settings(settings, Path(folder), _BUDGET_MB, gateway=limits, decoder={"l1_mb": _L1_MB})
        with own_system(own) as system:
            return asyncio.run(measure(system.target))


def _grpc_rows(samples: list[GrpcSample]) -> list[ReportRow]:
    from blockrag.evaluation.ttft_grpc import make_row

    times: dict[tuple[int, str], list[float]] = {}
    slots: dict[tuple[int, str], int] = {}
    for sample in samples:
        times.setdefault((sample.context_tokens, sample.state), []).append(sample.client_ms)
        slots[sample.context_tokens, sample.state] = sample.slots
    return [
        make_row("grpc", state, size, values, times[size, "none"], slots[size, state])
        for (size, state), values in times.items()
    ]


def _medians(samples: list[GrpcSample], value: Callable[[GrpcSample], float]) -> dict[str, float]:
    """By state."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        found.setdefault(sample.state, []).append(value(sample))
    return {state: round(statistics.median(values), 2) for state, values in found.items()}


def _overhead(samples: list[GrpcSample]) -> dict[str, float]:
    """Median of what the first token takes beyond the decoder's own work on it, by state."""
    own = ("kv_fetch", "compose", "prefill")
    return _medians(samples, lambda sample: sample.client_ms - sum(sample.stages_ms[stage] for stage in own))


def _stages(samples: list[GrpcSample]) -> dict[str, dict[str, float]]:
    """Median time of each stage before the first token, by state."""

    def median_of(name: str) -> dict[str, float]:
        return _medians(samples, lambda sample: sample.stages_ms[name])

    by_stage = {name: median_of(name) for name in ("plan", "queue", "kv_fetch", "compose", "prefill")}
    return {state: {name: found[state] for name, found in by_stage.items()} for state in by_stage["plan"]}


def _table(
    rows: list[ReportRow], sizes: tuple[int, ...], title: str, shown: Callable[[ReportRow | None], str]
) -> Table:
    from blockrag.evaluation.ttft_grpc import LABELS

    table = Table("", "", *(f"{size}" for size in sizes), title=title)
    for path in ("model", "grpc"):
        cells: dict[Any, ReportRow] = {(row.state, row.context_tokens): row for row in rows if row.path == path}
        for state, label in LABELS.items():
            line = [cells.get((state, size)) for size in sizes]
            if any(line):
                table.add_row(path, label, *map(shown, line))
        table.add_section()
    return table


def _timed(row: ReportRow | None) -> str:
    if row is None:
        return "–"
    return f"{row.median_ms:.1f}" if row.ratio_to_none is None else f"{row.median_ms:.1f} ({row.ratio_to_none:.1f})"


def _moved(row: ReportRow | None) -> str:
    if row is None or row.slots is None:
        return "–"
    return f"{row.slots}" if row.kv_bytes is None else f"{row.slots} ({row.kv_bytes / 1e6:.1f})"
