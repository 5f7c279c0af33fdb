"""Questions over a corpus: when they come, and which passages each is about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.simulation.scenario import Scenario

_AT_ONCE = 4096


@dataclass(frozen=True)
class Asked:
    """One question."""

    at: float
    """Seconds since the start."""
    passages: tuple[int, ...]
    """Ids in 0 … passages - 1, in the order of the prompt."""


class Workload:
    """A scenario's questions; the same ones each time."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        weights = np.arange(1, scenario.topics + 1, dtype=np.float64) ** -scenario.exponent
        self._cumulative: NDArray[np.float64] = np.cumsum(weights)

    def questions(self, count: int) -> Iterator[Asked]:
        """So many, from second 0 on."""
        scenario = self._scenario
        random = np.random.default_rng(scenario.seed)
        now, made = 0.0, 0
        while made < count:
            size = min(_AT_ONCE, count - made)
            gaps = random.exponential(1 / scenario.rate, size)
            ranks = np.searchsorted(self._cumulative, random.random(size) * self._cumulative[-1], side="right")
            picked = random.permuted(np.tile(np.arange(scenario.variety), (size, 1)), axis=1)[:, : scenario.top_k]
            for gap, rank, places in zip(gaps, ranks, picked, strict=True):
                now += float(gap)
                topic = (int(rank) + int(now / 3600 * scenario.drift)) % scenario.topics
                yield Asked(now, tuple(topic * scenario.variety + int(place) for place in places))
            made += size

    def by_popularity(self, count: int) -> range:
        """The ``count`` passages asked for most at the start, most popular first."""
        return range(min(count, self._scenario.topics * self._scenario.variety))
