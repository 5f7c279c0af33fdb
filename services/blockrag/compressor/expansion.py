"""Which chunks are expanded under a budget: pure functions of sizes and logits.

A compressed chunk takes one slot, an expanded one a slot per token. So a budget of slots leaves, beyond one slot for
every chunk, room to expand some; the policy's logits say which come first. The logits do not depend on the budget: a
larger one only expands more.

Source: REFRAG (arXiv 2509.01092, section on selective compression); budgets of tokens and time are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.compressor.compression import CompressionRequest
from blockrag.compressor.planning import PassageDecision, expand_what_fits
from blockrag.errors import InvalidRequestError
from blockrag.modeling.refrag.chunks import chunk_count
from blockrag.modeling.refrag.policy import choose


@dataclass(frozen=True)
class PrefillCost:
    """What a prefill takes on the decoder, as it measured lately."""

    base_ms: float
    slot_ms: float
    """For each composed slot."""

    def slots(self, milliseconds: float) -> int:
        """Composed slots that can be afforded; at least 0."""
        left = milliseconds - self.base_ms
        if left <= 0:
            return 0
        # A slot that was measured to cost nothing would afford any number: the model's positions bound it.
        return int(min(left / max(self.slot_ms, 1e-9), 2**31))


@dataclass(frozen=True)
class Room:
    """What a budget leaves before any chunk is chosen."""

    decisions: list[PassageDecision]
    """Which passages are in the prompt, at least compressed."""
    extra_slots: int
    """Slots beyond one for each chunk of those; at least 0."""
    needed_slots: int
    """The extra slots that expanding every chunk takes."""

    @property
    def kept(self) -> list[int]:
        """Places of the passages that are in the prompt."""
        return [place for place, decision in enumerate(self.decisions) if decision.in_prompt]

    @property
    def choice(self) -> bool:
        """Whether some chunks can be expanded and not all."""
        return 0 < self.extra_slots < self.needed_slots

    @property
    def everything(self) -> bool:
        """Whether every chunk can be expanded."""
        return self.extra_slots >= self.needed_slots


def room_for(
    passage_tokens: Sequence[int], chunk_tokens: int, request: CompressionRequest, most_slots: int, timed_slots: int = 0
) -> Room:
    """The room that a request's budget leaves for passages of these sizes, best first.

    ``most_slots``: what model and request allow passages to take in any case; ``timed_slots``: what a ``max_ttft_ms``
    affords. Passages that do not fit even compressed are dropped, the worst first; never for a rate, which says how
    small the prompt is to become and not how small it must be: at the highest rate every chunk is compressed, and
    the last ones of passages, being shorter, may keep it from being reached.
    """
    sizes = [chunk_count(tokens, chunk_tokens) for tokens in passage_tokens]
    if request.kind == "max_context_tokens":
        most_slots = min(most_slots, int(request.limit))
    elif request.kind == "max_ttft_ms":
        most_slots = min(most_slots, timed_slots)
    decisions = expand_what_fits(sizes, most_slots, compressed=True)
    kept = [index for index, decision in enumerate(decisions) if decision.in_prompt]
    tokens = sum(passage_tokens[index] for index in kept)
    compressed = sum(sizes[index] for index in kept)
    if request.kind == "rate":
        most_slots = min(most_slots, int(tokens / request.limit))
    return Room(decisions, max(0, most_slots - compressed), tokens - compressed)


def expand(logits: NDArray[np.float32], chunk_lengths: NDArray[np.int64], extra_slots: int) -> NDArray[np.bool_]:
    """Which chunks to expand, bool [chunks]: as many of the highest logits, one after another, as there is room for.

    No chunk is expanded while one of a higher logit is not; among equals the earlier goes first.
    """
    order = np.argsort(-logits, kind="stable")
    needed = np.cumsum(chunk_lengths[order] - 1)
    return choose(logits, int(np.searchsorted(needed, extra_slots, side="right")))


def chunk_lengths(passage_tokens: Sequence[int], chunk_tokens: int) -> NDArray[np.int64]:
    """Tokens of every chunk of all passages, in order, int64 [chunks]."""
    sizes = np.asarray(passage_tokens, dtype=np.int64)
    counts = -(-sizes // chunk_tokens)
    lengths = np.full(counts.sum(), chunk_tokens, dtype=np.int64)
    lengths[np.cumsum(counts) - 1] = sizes - chunk_tokens * (counts - 1)
    return lengths


def retrieval_logits(passage_tokens: Sequence[int], chunk_tokens: int) -> NDArray[np.float32]:
    """Logits of the policy "retrieval": every chunk of a better passage above every one of a worse."""
    counts = [chunk_count(tokens, chunk_tokens) for tokens in passage_tokens]
    return -np.repeat(np.arange(len(counts), dtype=np.float32), counts)


def affordable_slots(cost: PrefillCost, max_ttft_ms: float, spent_ms: float, instruction_slots: int) -> int:
    """Slots that passages may take so that the first token comes in time.

    ``spent_ms`` of the time is not the decoder's; the instruction block is composed too. Raises
    ``InvalidRequestError`` when the question alone takes longer.
    """
    least = spent_ms + cost.base_ms + instruction_slots * cost.slot_ms
    if max_ttft_ms < least:
        raise InvalidRequestError(
            "compression.max_ttft_ms",
            f"is {max_ttft_ms:g}; the question without any passage takes about {least:.0f} ms",
        )
    return max(0, cost.slots(max_ttft_ms - spent_ms) - instruction_slots)
