"""What Prometheus would make of the services' metrics, from two readings a moment apart."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from blockrag.errors import UnavailableError

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
