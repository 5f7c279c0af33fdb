"""What a prefill costs on this replica, measured on its own prompts: what plans under a latency budget rest on."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from blockrag.modeling.model import SlotModel

MOST_PREFILL_TOKENS = 128
"""Prompts that prefill more say little of what a question's cached slots cost."""
_KEPT_PER_SIZE = 8
_BLOCK_TOKENS = 64
_FINAL_TOKENS = 24
_MEASURED_SLOTS = (64, 256, 1024)
_REPEATS = 3


@dataclass(frozen=True)
class PrefillFit:
    """Milliseconds to compose and prefill a prompt: ``base_ms + slot_ms * composed slots``."""

    base_ms: float
    slot_ms: float
    prefills: int
    """How many it rests on; 0: there is none yet."""


class PrefillMeter:
    """Remembers the latest prefills of each size and fits a line through them. All calls from one thread.

    The latest few of every power of two of slots are kept, so that many prompts of one size do not push out what is
    known of the others.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[int, float]]] = {}

    def record(self, composed_slots: int, milliseconds: float) -> None:
        """Count one prefill: what composing and prefilling took behind so many cached slots."""
        kept = self._samples.setdefault(composed_slots.bit_length(), deque(maxlen=_KEPT_PER_SIZE))
        kept.append((composed_slots, milliseconds))

    def fit(self) -> PrefillFit:
        """The line, by Theil and Sen: slope and base are (weighted) medians, so that a prefill that had to share the
        machine changes little. Never falling and never below 0."""
        samples = np.array([sample for kept in self._samples.values() for sample in kept], dtype=np.float64)
        if not len(samples):
            return PrefillFit(0.0, 0.0, 0)
        slots, times = samples.T
        first, second = np.triu_indices(len(samples), k=1)
        distance = slots[second] - slots[first]
        apart = distance != 0
        slope = 0.0
        if apart.any():
            slopes = (times[second] - times[first])[apart] / distance[apart]
            slope = max(0.0, _weighted_median(slopes, np.abs(distance[apart])))
        return PrefillFit(max(0.0, float(np.median(times - slope * slots))), slope, len(samples))


def measure_prefills(model: SlotModel, meter: PrefillMeter) -> None:
    """Prefill made-up prompts of a few sizes, so that there is a fit before the first question.

    Call it before the engine starts, on a model that is warm.
    """
    tokens = min(_BLOCK_TOKENS, model.max_positions // 4)
    if tokens < 1:
        return
    [block] = [model.to_resident(block) for block in model.encode([[0] * tokens], ["measured"])]
    for slots in _MEASURED_SLOTS:
        copies = slots // tokens
        if copies * tokens + _FINAL_TOKENS > model.max_positions:
            return
        for _ in range(_REPEATS):
            started = time.perf_counter()
            state = model.new_sequence([block] * copies, _FINAL_TOKENS)
            model.forward([(state, [0] * _FINAL_TOKENS)])
            meter.record(copies * tokens, 1000 * (time.perf_counter() - started))
            state.release()


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
