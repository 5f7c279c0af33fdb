"""``blockrag top``: what the system does, as Prometheus would make it of two readings of the metrics."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from blockrag.cli import console
from blockrag.cli.console import Connection, JsonOption
from blockrag.cli.options import command_of
from blockrag.errors import NotFoundError, UnavailableError
from blockrag.local import LocalSystem
from blockrag.results import Description

_QUANTILES = (0.5, 0.95, 0.99)
_BAR = 30
PREFIX = "ray_blockrag_"
"""Ray puts its own name before ours."""
_TIMEOUT_S = 5.0

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """One reading of all series of ours."""

    series: Mapping[tuple[str, Labels], float] = field(default_factory=dict)
    """Values by name (without the prefix) and labels."""

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """Read Prometheus' text format."""
        from prometheus_client.parser import text_string_to_metric_families

        series = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(PREFIX):
                    series[sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())] = float(sample.value)
        return cls(series)

    @classmethod
    def of(cls, url: str) -> Scrape:
        """Read ``url``. Raises UnavailableError when nothing answers there."""
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
                text = response.read().decode()
        except (OSError, ValueError) as error:
            raise UnavailableError(f"metrics at {url}: {error}") from error
        return cls.parse(text)

    def since(self, before: Scrape) -> Scrape:
        """How much every series grew; one that is new, or smaller because its process began again, from 0."""
        grown = {}
        for key, value in self.series.items():
            last = before.series.get(key, 0.0)
            grown[key] = value - last if value >= last else value
        return Scrape(grown)

    def total(self, name: str, **labels: str) -> float:
        """Sum of the series of ``name`` that have these labels."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.series.items() if found == name and wanted <= has)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums of ``name`` by the values of a label."""
        sums: dict[str, float] = {}
        for (found, has), value in self.series.items():
            if found == name and (of := dict(has).get(label)) is not None:
                sums[of] = sums.get(of, 0.0) + value
        return sums

    def quantile(self, name: str, share: float, **labels: str) -> float | None:
        """A histogram's quantile in its unit, by Prometheus' own rule (linear within a bucket); None without values."""
        wanted = set(labels.items())
        counts: dict[float, float] = {}
        for (found, has), value in self.series.items():
            if found == f"{name}_bucket" and wanted <= has:
                bound = float(dict(has)["le"])
                counts[bound] = counts.get(bound, 0.0) + value
        bounds = sorted(counts)
        if not bounds or counts[bounds[-1]] <= 0:
            return None
        rank, low, below = share * counts[bounds[-1]], 0.0, 0.0
        for bound in bounds:
            if counts[bound] >= rank:
                if bound == float("inf"):
                    return low
                return low + (bound - low) * (rank - below) / max(counts[bound] - below, 1e-12)
            low, below = bound, counts[bound]
        return low


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: blockrag top")(top)


@command_of(Connection, last=True)
def top(
    connection: Connection,
    metrics: Annotated[
        str, typer.Option(help="URL of Ray's metrics; default: those of the system on this machine.")
    ] = "",
    interval: Annotated[float, typer.Option(min=0.5, max=3600, help="Seconds between two readings.")] = 2.0,
    readings: Annotated[int, typer.Option(min=0, help="End after so many; 0: go on until Ctrl-C.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Watch requests, times to first token, caches and queues."""
    url = metrics or _local_metrics(connection)
    with (
        nullcontext() if as_json else Live(console=console.out, auto_refresh=False) as shown,
        suppress(KeyboardInterrupt),
    ):
        before, when = Scrape.of(url), time.monotonic()
        count = 0
        while not readings or count < readings:
            time.sleep(interval)
            description = connection.run(lambda client: client.describe())
            now, moment = Scrape.of(url), time.monotonic()
            values = summary(now.since(before), moment - when, description)
            before, when, count = now, moment, count + 1
            if shown is None:
                console.print_json_line(values)
            else:
                shown.update(_screen(values), refresh=True)


def summary(grown: Scrape, seconds: float, description: Description) -> dict[str, Any]:
    """What happened in ``seconds``, by what the metrics grew and by what the services say of themselves."""
    tiers: dict[str, dict[str, float]] = {}
    hits = grown.by("kv_cache_hit_tokens_total", "tier")
    for tier, asked in grown.by("kv_cache_query_tokens_total", "tier").items():
        tiers[tier] = {"tokens_per_s": asked / seconds, "hit_rate": hits.get(tier, 0.0) / asked if asked else 0.0}
    cache, decoder = description.kv_cache, description.decoder
    for tier, used, budget in (
        ("l1", decoder["l1_bytes"], decoder["l1_budget_bytes"]),
        ("store", cache["bytes"], cache["budget_bytes"]),
    ):
        tiers.setdefault(tier, {"tokens_per_s": 0.0, "hit_rate": 0.0})
        tiers[tier].update(bytes=int(used), budget_bytes=int(budget))
    modes = sorted(grown.by("time_to_first_token_seconds_count", "attention_mode"))
    return {
        "seconds": seconds,
        "requests_per_s": {m: n / seconds for m, n in grown.by("requests_total", "method").items()},
        "failed_per_s": {
            status: n / seconds
            for status, n in grown.by("requests_total", "status").items()
            if status not in ("OK", "CANCELLED") and n
        },
        "generated_tokens_per_s": grown.total("generated_tokens_total") / seconds,
        "encoded_tokens_per_s": grown.total("encoded_tokens_total") / seconds,
        "time_to_first_token_ms": {
            mode: {
                f"p{share * 100:g}": _ms(grown.quantile("time_to_first_token_seconds", share, attention_mode=mode))
                for share in _QUANTILES
            }
            for mode in modes
            if grown.total("time_to_first_token_seconds_count", attention_mode=mode)
        },
        "stages_ms": {
            stage: 1000 * grown.total("stage_seconds_sum", stage=stage) / count
            for stage, count in grown.by("stage_seconds_count", "stage").items()
            if count
        },
        "tiers": tiers,
        "running": int(decoder["running"]),
        "waiting": int(decoder["waiting"]),
        "down": [service.name for service in description.services if not service.healthy],
    }


def _local_metrics(connection: Connection) -> str:
    if connection.target:
        raise NotFoundError("--target needs --metrics too: the URL of Ray's metrics there")
    return LocalSystem.attach(console.settings_from(connection.settings)).metrics_url


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _screen(values: dict[str, Any]) -> Group:
    asked = "  ".join(f"{method} {rate:.1f}/s" for method, rate in values["requests_per_s"].items() if rate) or "none"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("requests", Text(asked))
    failed = "  ".join(f"{status} {rate:.1f}/s" for status, rate in values["failed_per_s"].items())
    facts.add_row("failed", Text(failed or "none", style="red" if failed else ""))
    facts.add_row("queue", f"{values['running']} running, {values['waiting']} waiting")
    facts.add_row(
        "tokens", f"{values['generated_tokens_per_s']:.0f}/s written, {values['encoded_tokens_per_s']:.0f}/s encoded"
    )
    if values["down"]:
        facts.add_row("down", Text(", ".join(values["down"]), style="bold red"))
    times = Table("first token, ms", *(f"p{share * 100:g}" for share in _QUANTILES), box=None)
    for mode, found in values["time_to_first_token_ms"].items():
        times.add_row(mode, *(f"{value:.0f}" if value is not None else "–" for value in found.values()))
    tiers = Table("tier", "bytes", "", "hits, tokens", "tokens/s", box=None)
    for tier, found in values["tiers"].items():
        share = found["bytes"] / found["budget_bytes"] if found.get("budget_bytes") else 0.0
        bar = "█" * round(_BAR * min(share, 1.0))
        tiers.add_row(
            tier,
            f"{found.get('bytes', 0) / 2**20:.0f} MiB",
            f"{bar:<{_BAR}} {share:.0%}",
            f"{found['hit_rate']:.1%}",
            f"{found['tokens_per_s']:.0f}",
        )
    stages = "  ".join(f"{stage} {ms:.0f}" for stage, ms in values["stages_ms"].items() if ms >= 0.5)
    return Group(facts, times, tiers, Text(f"mean ms  {stages}" if stages else ""))
