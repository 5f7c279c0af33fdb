"""The latest measurements, as long as they are fresh, and a line through them that one odd value changes little."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_TOGETHER_S = 60.0
_LATEST = 8


class Line(NamedTuple):
    """``base + slope * size``."""

    base: float
    slope: float
    samples: int
    """How many it rests on; 0: there is none yet."""

    def at(self, size: int) -> float:
        """What it says of a size; 0 while it rests on nothing."""
        return self.base + self.slope * size


class Recent:
    """Remembers the latest values measured at each size. Not for several threads.

    The latest few of every power of two of sizes are kept, so that many of one size do not push out what is known of
    the others.
    """

    def __init__(self, kept: int = 8, fresh_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        """``kept``: of each power of two. ``fresh_s``: for how long a value counts."""
        self._kept = kept
        self._fresh_s = fresh_s
        self._clock = clock
        self._samples: dict[int, deque[tuple[int, float, float]]] = {}

    def record(self, value: float, size: int = 0) -> None:
        """Count a value; ``size``: of what it was measured at, where that matters."""
        kept = self._samples.setdefault(size.bit_length(), deque(maxlen=self._kept))
        kept.append((size, value, self._clock()))

    def values(self) -> list[float]:
        """All that count."""
        return [value for _, value, _ in self._fresh()]

    def line(self) -> Line:
        """By Theil and Sen: slope and base are (weighted) medians. Never falling and never below 0.

        The slope is that between values of the same minute, where there are such, and the base of the latest ones: so
        what a busy machine took says nothing of a quiet one.
        """
        kept = self._fresh()
        if not kept:
            return Line(0.0, 0.0, 0)
        sizes, values, when = np.array(kept, dtype=np.float64).T
        first, second = np.triu_indices(len(kept), k=1)
        distance = sizes[second] - sizes[first]
        apart = distance != 0
        together = apart & (np.abs(when[second] - when[first]) <= _TOGETHER_S)
        chosen = together if together.any() else apart
        slope = 0.0
        if chosen.any():
            slopes = (values[second] - values[first])[chosen] / distance[chosen]
            slope = max(0.0, _weighted_median(slopes, np.abs(distance[chosen])))
        rest = (values - slope * sizes)[np.argsort(when, kind="stable")[-_LATEST:]]
        return Line(max(0.0, float(np.median(rest))), slope, len(kept))

    def _fresh(self) -> list[tuple[int, float, float]]:
        oldest = self._clock() - self._fresh_s
        return [sample for each in self._samples.values() for sample in each if sample[2] >= oldest]


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
