"""``blockrag bench load`` and ``blockrag simulate``: many questions at once, measured and predicted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blockrag.cli import console
from blockrag.cli.console import Connection, JsonOption
from blockrag.cli.measured import as_bytes, counted, parse_rates, write_results
from blockrag.cli.options import command_of
from blockrag.errors import InvalidRequestError
from blockrag.simulation.scenario import Scenario, StageTimes

if TYPE_CHECKING:
    from blockrag.evaluation.load import LoadRow
    from blockrag.settings import Settings
    from blockrag.simulation.cluster import Outcome

BenchOption = Annotated[
    Path | None,
    typer.Option("--bench", help="ttft.json of `blockrag bench ttft`, for the times of parts; default: built in."),
]
TargetTimeOption = Annotated[float, typer.Option("--target-ms", min=1, help="Time to first token to keep.")]

_OF_THE_SYSTEM = (
    *("machines", "rate", "l1_mb", "store_mb", "disk_mb", "slot_bytes", "caching", "routing", "drift"),
    "max_sequences",
)
"""Of a scenario, what a running system has by itself."""


@dataclass(frozen=True)
class Load:
    """What is asked, and of whom."""

    scenario: Scenario
    connection: Connection


def register(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands."""
    bench.command(epilog="Example: blockrag bench load --rates 0.5,1,2 --passages 400")(
        command_of(Load, left_out=_OF_THE_SYSTEM)(load)
    )
    app.command(epilog="Example: blockrag simulate --passages 1000000 --rate 100 --size")(
        command_of(Scenario)(simulate)
    )


def load(
    config: Load,
    rates: Annotated[str, typer.Option(help="Questions a second, one run each, comma separated.")] = "0.5,1,2",
    questions: Annotated[int, typer.Option(min=1, help="Counted in each run, after a fifth as many to warm.")] = 60,
    passages: Annotated[int, typer.Option(min=1, help="Passages of the sample corpus.")] = 400,
    full: Annotated[bool, typer.Option(help="Ask with full attention too, where no block is reused.")] = True,
    target_ms: TargetTimeOption = 1000.0,
    bench: BenchOption = None,
    out: Annotated[Path | None, typer.Option(help="File for the rows, as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a running system at given rates, however long it takes to answer, and show what a simulation predicts.

    Passages of the sample corpus are given with the questions; nothing is ingested. --settings are those of the system.
    """
    from blockrag.configured import configured_bundle
    from blockrag.evaluation.load import measure_load
    from blockrag.evaluation.ttft_grpc import first_passages

    loaded = console.settings_from(config.connection.settings)
    scenario = _on(replace(config.scenario, questions=questions, passages=passages), loaded)
    given = first_passages(configured_bundle(loaded), passages)
    parsed = parse_rates(rates, "--rates")
    if not parsed or not all(0 < rate < 1e6 for rate in parsed):
        raise InvalidRequestError("rates", f"{rates!r}: must be numbers above 0, separated by commas")
    with counted("questions") as tell:
        rows = config.connection.run(
            lambda client: measure_load(
                client,
                scenario,
                given,
                parsed,
                ("block", "full") if full else ("block",),
                _times(bench),
                target_s=target_ms / 1000,
                on_progress=tell,
            )
        )
    if out is not None:
        result = {"scenario": asdict(scenario), "rows": [asdict(row) for row in rows]}
        write_results(out.parent, {out.name: as_bytes(result)})
    console.answer(as_json, rows, _load_table(rows, target_ms))


def simulate(
    config: Scenario,
    size: Annotated[bool, typer.Option("--size", help="Find the fewest machines that keep --target-ms.")] = False,
    target_ms: TargetTimeOption = 1000.0,
    bench: BenchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict hit rates and times to first token of a cluster by a discrete-event simulation.

    With --size also how many machines the load needs, beside prefix caching and no caching on the same machines.
    """
    from blockrag.simulation.cluster import beside_others
    from blockrag.simulation.cluster import simulate as run

    times = _times(bench)
    found: list[tuple[Scenario, Outcome | None]]
    found = beside_others(config, times, target_ms / 1000) if size else [(config, run(config, times))]
    console.answer(as_json, [{"scenario": each, "outcome": outcome} for each, outcome in found], _outcome_table(found))


def _on(config: Scenario, settings: Settings) -> Scenario:
    """The scenario on the system that the settings describe."""
    return replace(
        config,
        l1_mb=float(settings.decoder.l1_mb),
        store_mb=float(settings.kv_cache.budget_mb),
        disk_mb=float(settings.kv_cache.disk_mb),
        max_sequences=settings.decoder.max_sequences,
    )


def _times(bench: Path | None) -> StageTimes:
    return StageTimes() if bench is None else StageTimes.of_bench(bench)


def _load_table(rows: list[LoadRow], target_ms: float) -> Table:
    table = Table(title=f"open loop; goodput: answers a second within {target_ms:g} ms; in brackets: predicted")
    for name in ("rate", "mode", "p50, s", "p95, s", "p99, s", "goodput", "found", "memory", "store", "disk", "failed"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        tiers = (f"{row.shares[tier]:.0%}" for tier in ("l1", "store", "disk"))
        table.add_row(
            *(f"{row.rate:g}", row.mode),
            f"{row.ttft_p50:.2f} ({row.predicted_p50:.2f})",
            f"{row.ttft_p95:.2f} ({row.predicted_p95:.2f})",
            *(f"{row.ttft_p99:.2f}", f"{row.goodput:.2f}"),
            f"{row.held:.0%} ({row.predicted_held:.0%})",
            *tiers,
            f"{row.failed}",
        )
    return table


def _outcome_table(found: list[tuple[Scenario, Outcome | None]]) -> Table:
    table = Table(title="simulated")
    names = ("caching", "machines", "p50, s", "p95, s", "found", "decoders", "encoders", "links", "machine-s / 1,000")
    for name in names:
        table.add_column(name, justify="left" if name == "caching" else "right")
    for scenario, outcome in found:
        if outcome is None:
            table.add_row(scenario.caching, "too many", *("",) * (len(names) - 2))
            continue
        table.add_row(
            *(scenario.caching, f"{scenario.machines:,}"),
            *(f"{outcome.ttft_p50:.2f}", f"{outcome.ttft_p95:.2f}{'↑' if outcome.growing else ''}"),
            *(f"{1 - outcome.shares['encoded']:.0%}", f"{outcome.decoders:.0%}", f"{outcome.encoders:.0%}"),
            *(f"{outcome.links:.0%}", f"{outcome.machine_seconds:,.0f}"),
        )
    return table
