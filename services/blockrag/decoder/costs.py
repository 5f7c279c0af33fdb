"""What prompts cost on this replica, measured on its own: what plans under a latency budget rest on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from blockrag.decoder.block_loading import BlockTier

if TYPE_CHECKING:
    from blockrag.modeling.model import SlotModel

MOST_PREFILL_TOKENS = 128
"""Prompts that prefill more say little of what a question's cached slots cost."""
_KEPT_PER_SIZE = 8
_BLOCK_TOKENS = 64
_FINAL_TOKENS = 24
_MEASURED_SLOTS = (64, 256, 1024)
_REPEATS = 3
_MEASURED_BLOCKS = (1, 4)
_SHELVES: tuple[BlockTier, ...] = ("disk", "store")
_FRESH_S = 60.0
_TOGETHER_S = 60.0
_LATEST = 8


@dataclass(frozen=True)
class CostFit:
    """``base_ms + slot_ms * slots``, in milliseconds."""

    base_ms: float
    slot_ms: float
    samples: int
    """How many it rests on; 0: there is none yet."""


class CostMeter:
    """Remembers the latest times of each number of slots and fits a line through them. All calls from one thread.

    The latest few of every power of two of slots are kept, so that many prompts of one size do not push out what is
    known of the others.
    """

    def __init__(self, fresh_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        """``fresh_s``: for how long a time counts."""
        self._fresh_s = fresh_s
        self._clock = clock
        self._samples: dict[int, deque[tuple[int, float, float]]] = {}

    def record(self, slots: int, milliseconds: float) -> None:
        """Count what so many slots took."""
        kept = self._samples.setdefault(slots.bit_length(), deque(maxlen=_KEPT_PER_SIZE))
        kept.append((slots, milliseconds, self._clock()))

    def fit(self) -> CostFit:
        """The line, by Theil and Sen: slope and base are (weighted) medians, so that one that had to share the machine
        changes little. Never falling and never below 0.

        The slope is that between times of the same minute, where there are such, and the base of the latest times: so
        what a busy machine took says nothing of a quiet one.
        """
        oldest = self._clock() - self._fresh_s
        kept = [sample for each in self._samples.values() for sample in each if sample[2] >= oldest]
        if not kept:
            return CostFit(0.0, 0.0, 0)
        slots, times, when = np.array(kept, dtype=np.float64).T
        first, second = np.triu_indices(len(kept), k=1)
        distance = slots[second] - slots[first]
        apart = distance != 0
        together = apart & (np.abs(when[second] - when[first]) <= _TOGETHER_S)
        chosen = together if together.any() else apart
        slope = 0.0
        if chosen.any():
            slopes = (times[second] - times[first])[chosen] / distance[chosen]
            slope = max(0.0, _weighted_median(slopes, np.abs(distance[chosen])))
        rest = (times - slope * slots)[np.argsort(when, kind="stable")[-_LATEST:]]
        return CostFit(max(0.0, float(np.median(rest))), slope, len(kept))


@dataclass(frozen=True)
class CostMeters:
    """Of all that comes before a first token."""

    prefill: CostMeter = field(default_factory=CostMeter)
    """Composing and prefilling, by composed slots."""
    fetches: dict[BlockTier, CostMeter] = field(default_factory=lambda: {"encoded": CostMeter(), **_shelves()})
    """Having blocks that are not in the L1, by their tokens. Those of several places come at the same time."""

    def record_fetch(self, tokens: Mapping[BlockTier, int], milliseconds: float) -> None:
        """Count what a prompt's blocks took, as a time of those from the slowest place."""
        slowest = next((tier for tier in self.fetches if tokens.get(tier)), None)
        if slowest is not None:
            self.fetches[slowest].record(tokens[slowest], milliseconds)


def _shelves() -> dict[BlockTier, CostMeter]:
    # A disk that was slow once would not be read again by plans that have no time for it, nor measured.
    return {tier: CostMeter(_FRESH_S) for tier in _SHELVES}


def measure_costs(model: SlotModel, meters: CostMeters) -> None:
    """Encode and prefill made-up prompts of a few sizes, so that there are fits before the first question.

    Call it before the engine starts, on a model that is warm.
    """
    tokens = min(_BLOCK_TOKENS, model.max_positions // 4)
    if tokens < 1:
        return
    for count in _MEASURED_BLOCKS:
        started = time.perf_counter()
        blocks = model.encode([[0] * tokens] * count, ["measured"] * count)
        meters.fetches["encoded"].record(count * tokens, 1000 * (time.perf_counter() - started))
    block = model.to_resident(blocks[0])
    for slots in _MEASURED_SLOTS:
        copies = slots // tokens
        if copies * tokens + _FINAL_TOKENS > model.max_positions:
            return
        for _ in range(_REPEATS):
            started = time.perf_counter()
            state = model.new_sequence([block] * copies, _FINAL_TOKENS)
            model.forward([(state, [0] * _FINAL_TOKENS)])
            meters.prefill.record(copies * tokens, 1000 * (time.perf_counter() - started))
            state.release()


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
