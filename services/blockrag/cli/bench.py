"""``blockrag bench``: how fast."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blockrag.cli import console
from blockrag.cli.bench_peers import peers
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.errors import SettingsError
from blockrag.local import LocalSystem
from blockrag.local.preflight import free_port
from blockrag.settings import Settings

if TYPE_CHECKING:
    from blockrag.evaluation.ttft_grpc import GrpcSample
    from blockrag.evaluation.ttft_report import ReportRow

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
    from blockrag.configured import configured_bundle
    from blockrag.evaluation.environment import describe_environment
    from blockrag.evaluation.plots import plot_rows
    from blockrag.evaluation.ttft_report import rate_notes

    with console.errors_to_exit():
        loaded = console.settings_from(settings)
        sizes = _sizes(contexts)
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
            rows += _measure_model(loaded, sizes, repeats, chunk)
        if grpc:
            samples = _measure_grpc(loaded, sizes, repeats)
            rows += _grpc_rows(samples)
            overhead, stages = _overhead(samples), _stages(samples)
        environment = describe_environment()
        result = {
            "rows": [asdict(row) for row in rows],
            "notes": notes,
            "grpc_overhead_ms": overhead,
            "grpc_stages_ms": stages,
            "settings": loaded.model_dump(mode="json", include={"bundle", "decoder", "encoder"}),
            "environment": asdict(environment),
        }
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "ttft.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            plot_rows(rows, out / "ttft.png", f"{environment.cores} × {environment.cpu}, {environment.commit}")
        if as_json:
            console.print_json(result)
        else:
            console.out.print(_table(rows, sizes, "Time to first token, ms: median (× no retrieval)", _timed))
            console.out.print(_table(rows, sizes, "Slots of the passages (MB of K and V moved)", _moved))
            for note in notes:
                console.out.print(note)
            if overhead:
                text = ", ".join(f"{state} {value:.1f}" for state, value in overhead.items())
                console.out.print(f"first token over gRPC minus model time, median ms: {text}")


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
    from blockrag.evaluation.environment import describe_environment
    from blockrag.evaluation.plan_time import measure_plans
    from blockrag.evaluation.ttft_grpc import first_passages

    with console.errors_to_exit():
        loaded = console.settings_from(settings)
        bundle = configured_bundle(loaded)
        with console.progress_bar() as bar:
            task = bar.add_task("plans", total=None)
            times = asyncio.run(
                measure_plans(
                    bundle,
                    loaded,
                    first_passages(bundle, passages),
                    rate=rate,
                    repeats=repeats,
                    on_progress=lambda done, total: bar.update(task, completed=done, total=total),
                )
            )
        if as_json:
            environment = asdict(describe_environment())
            console.print_json({"rows": [asdict(row) for row in times], "rate": rate, "environment": environment})
            return
        title = f"Plan of {passages} passages ({times[0].chunks} chunks) at rate {rate:g}, ms"
        table = Table("policy", "median", "p90", "of it the policy", title=title)
        for row in times:
            table.add_row(row.policy, f"{row.median_ms:.2f}", f"{row.p90_ms:.2f}", f"{row.policy_ms:.2f}")
        console.out.print(table)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"--contexts {text!r}: must be numbers, comma separated") from error
    if not sizes or min(sizes) < 128:
        raise SettingsError(f"--contexts {text!r}: must be at least 128 each")
    return sizes


def _measure_model(settings: Settings, sizes: tuple[int, ...], repeats: int, chunk_tokens: int) -> list[ReportRow]:
    from blockrag.configured import configured_bundle, configured_device
    from blockrag.evaluation.ttft_model import measure_model_ttft

    with console.progress_bar() as bar:
        task = bar.add_task("model alone", total=None)
        return measure_model_ttft(
            configured_bundle(settings),
            settings,
            contexts=sizes,
            repeats=repeats,
            chunk_tokens=chunk_tokens,
            device=configured_device(settings),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _measure_grpc(settings: Settings, sizes: tuple[int, ...], repeats: int) -> list[GrpcSample]:
    from blockrag.client import BlockragClient
    from blockrag.configured import configured_bundle
    from blockrag.evaluation.ttft_grpc import make_workload, measure_grpc_ttft

    bundle = configured_bundle(settings)
    workload = make_workload(bundle, sizes)

    async def measure(target: str) -> list[GrpcSample]:
        with console.progress_bar() as bar:
            task = bar.add_task("over gRPC", total=None)
            async with BlockragClient(target) as client:
                return await measure_grpc_ttft(
                    client,
                    workload,
                    chunk_tokens=bundle.chunk_tokens if bundle.refrag is not None else None,
                    repeats=repeats,
                    on_progress=lambda done, total: bar.update(task, completed=done, total=total),
                )

    with tempfile.TemporaryDirectory(prefix="blockrag-bench-") as state_dir:
        cluster = {
            "state_dir": state_dir,
            "grpc_port": free_port(),
            "http_port": free_port(),
            "object_store_mb": max(settings.cluster.object_store_mb, _BUDGET_MB * 3 // 2),
        }
        changed = settings.model_copy(
            update={
                "cluster": settings.cluster.model_copy(update=cluster),
                "gateway": settings.gateway.model_copy(update={"max_top_k": 1000}),
                "kv_cache": settings.kv_cache.model_copy(update={"budget_mb": _BUDGET_MB}),
                "decoder": settings.decoder.model_copy(update={"l1_mb": _L1_MB}),
            }
        )
        with console.err.status("starting") as line:
            system = LocalSystem.start(changed, on_progress=line.update, owned=True)
        with system:
            return asyncio.run(measure(system.target))


def _grpc_rows(samples: list[GrpcSample]) -> list[ReportRow]:
    from blockrag.evaluation.ttft_report import make_row

    times: dict[tuple[int, str], list[float]] = {}
    slots: dict[tuple[int, str], int] = {}
    for sample in samples:
        times.setdefault((sample.context_tokens, sample.state), []).append(sample.client_ms)
        slots[sample.context_tokens, sample.state] = sample.slots
    return [
        make_row("grpc", state, size, values, times[size, "none"], slots[size, state])
        for (size, state), values in times.items()
    ]


def _overhead(samples: list[GrpcSample]) -> dict[str, float]:
    """Median of what the first token takes beyond the decoder's own work on it, by state."""
    by_state: dict[str, list[float]] = {}
    for sample in samples:
        own = sum(sample.stages_ms[stage] for stage in ("kv_fetch", "compose", "prefill"))
        by_state.setdefault(sample.state, []).append(sample.client_ms - own)
    return {state: round(statistics.median(values), 2) for state, values in by_state.items()}


def _stages(samples: list[GrpcSample]) -> dict[str, dict[str, float]]:
    """Median time of each stage before the first token, by state."""
    by_state: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        times = by_state.setdefault(sample.state, {})
        for stage in ("plan", "queue", "kv_fetch", "compose", "prefill"):
            times.setdefault(stage, []).append(sample.stages_ms[stage])
    return {
        state: {stage: round(statistics.median(values), 2) for stage, values in times.items()}
        for state, times in by_state.items()
    }


def _table(
    rows: list[ReportRow], sizes: tuple[int, ...], title: str, shown: Callable[[ReportRow | None], str]
) -> Table:
    from blockrag.evaluation.ttft_report import LABELS

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
