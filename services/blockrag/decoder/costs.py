"""What prompts cost on this replica, measured on its own: what plans under a latency budget rest on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blockrag.decoder.block_loading import BlockTier
from blockrag.recent import Recent

if TYPE_CHECKING:
    from blockrag.modeling.model import SlotModel

MOST_PREFILL_TOKENS = 128
"""Prompts that prefill more say little of what a question's cached slots cost."""
_BLOCK_TOKENS = 64
_FINAL_TOKENS = 24
_MEASURED_SLOTS = (64, 256, 1024)
_REPEATS = 3
_MEASURED_BLOCKS = (1, 4)
_FRESH_S = 60.0


def _fetches() -> dict[BlockTier, Recent]:
    # The slowest first. A disk that was slow once would not be read again by plans that have no time for it, nor
    # measured.
    return {"encoded": Recent(), "disk": Recent(fresh_s=_FRESH_S), "store": Recent(fresh_s=_FRESH_S)}


@dataclass(frozen=True)
class CostMeters:
    """Of all that comes before a first token."""

    prefill: Recent = field(default_factory=Recent)
    """Composing and prefilling, by composed slots."""
    fetches: dict[BlockTier, Recent] = field(default_factory=_fetches)
    """Having blocks that are not in the L1, by their tokens. Those of several places come at the same time."""

    def record_fetch(self, tokens: Mapping[BlockTier, int], milliseconds: float) -> None:
        """Count what a prompt's blocks took, as a time of those from the slowest place."""
        if tokens.get("volume"):
            return  # no shard says ahead what is there, and how long it took says nothing of the other places
        slowest = next((tier for tier in self.fetches if tokens.get(tier)), None)
        if slowest is not None:
            self.fetches[slowest].record(milliseconds, tokens[slowest])


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
        meters.fetches["encoded"].record(1000 * (time.perf_counter() - started), count * tokens)
    block = model.to_resident(blocks[0])
    for slots in _MEASURED_SLOTS:
        copies = slots // tokens
        if copies * tokens + _FINAL_TOKENS > model.max_positions:
            return
        for _ in range(_REPEATS):
            started = time.perf_counter()
            state = model.new_sequence([block] * copies, _FINAL_TOKENS)
            model.forward([(state, [0] * _FINAL_TOKENS)])
            meters.prefill.record(1000 * (time.perf_counter() - started), copies * tokens)
            state.release()
