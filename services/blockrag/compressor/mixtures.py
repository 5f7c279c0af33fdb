"""What becomes of the passages of a prompt, and the part of deciding it that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.budget import PassageDecision, Room, chunk_count, chunk_lengths, expand, retrieval_logits, room_for
from blockrag.compressor.compression import RETRIEVAL, CompressionRequest


@dataclass(frozen=True)
class Candidates:
    """What a question's plan is made of."""

    blocks: Sequence[tuple[int, ...]]
    """Token ids of the passages' blocks, best first."""
    document_ids: Sequence[str]
    instruction_tokens: int
    final_ids: Sequence[int]
    most_slots: int
    """What the model and the request let passages take in any case."""


@dataclass(frozen=True)
class Mixture:
    """What becomes of the candidates."""

    decisions: list[PassageDecision]
    expanded: list[NDArray[np.bool_]]
    """Of the chunks of each passage that is in the prompt; no rows for one that is dropped."""
    policy_ms: float = 0.0
    """Time that the policy took; 0: it was not asked."""


def mix_by_size(compression: CompressionRequest, candidates: Candidates, chunk_tokens: int) -> Mixture:
    """The mixture of a request that ``sizes_decide``. Raises ValueError for one that a policy or time decides."""
    sizes = [len(ids) for ids in candidates.blocks]
    room = room_for(sizes, chunk_tokens, compression.kind, compression.limit, candidates.most_slots)
    if compression.kind == "max_ttft_ms" or (room.choice and compression.policy != RETRIEVAL):
        raise ValueError(f"{compression} is not decided by sizes")
    return mixture_by_size(room, sizes, chunk_tokens)


def mixture_by_size(room: Room, sizes: Sequence[int], chunk_tokens: int) -> Mixture:
    """Better passages' chunks first, where there is a choice."""
    kept = room.kept
    lengths = chunk_lengths([sizes[place] for place in kept], chunk_tokens)
    if room.choice:
        logits = retrieval_logits([sizes[place] for place in kept], chunk_tokens)
        expanded = expand(logits, lengths, room.extra_slots)
    else:
        expanded = np.full(len(lengths), room.everything)
    return Mixture(room.decisions, by_passage(expanded, sizes, kept, chunk_tokens))


def by_passage(
    expanded: NDArray[np.bool_], sizes: Sequence[int], kept: Sequence[int], chunk_tokens: int
) -> list[NDArray[np.bool_]]:
    parts = [np.zeros(0, dtype=np.bool_)] * len(sizes)
    start = 0
    for place in kept:
        end = start + chunk_count(sizes[place], chunk_tokens)
        parts[place] = expanded[start:end]
        start = end
    return parts
