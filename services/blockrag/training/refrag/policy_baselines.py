"""Choices that a policy is compared with, as scores: one number per chunk, the highest are expanded first.

All take what a prompt's chunks are known by and none learns anything. Scores of equal chunks keep the prompt's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from blockrag.budget import chunk_bounds

Scores = NDArray[np.float32]
"""[chunks]"""


def random_scores(chunks: int, seed: int) -> Scores:
    """A random order."""
    return np.random.default_rng(seed).permutation(chunks).astype(np.float32)


def surprising_first(chunk_losses: NDArray[np.float32]) -> Scores:
    """Chunks of the highest perplexity first: what the decoder would not have guessed."""
    return chunk_losses.astype(np.float32)


def surprising_last(chunk_losses: NDArray[np.float32]) -> Scores:
    """Chunks of the lowest perplexity first."""
    return -chunk_losses.astype(np.float32)


def best_passages_first(chunk_counts: Sequence[int], ranks: Sequence[int]) -> Scores:
    """Whole passages by the rank that retrieval gave them (0 is the best), each from its beginning."""
    longest = max(chunk_counts, default=1)
    return np.concatenate(
        [
            -(rank * longest + np.arange(count, dtype=np.float32))
            for count, rank in zip(chunk_counts, ranks, strict=True)
        ]
        or [np.zeros(0, dtype=np.float32)]
    )


def similar_to_question(embeddings: Tensor, question: Tensor) -> Scores:
    """Cosine of a chunk's embedding [chunks, width] and the nearest of the question's [question chunks, width].

    All zeros where there is no question.
    """
    if not len(question) or not len(embeddings):
        return np.zeros(len(embeddings), dtype=np.float32)
    found = F.normalize(embeddings, dim=1) @ F.normalize(question, dim=1).T
    scores: Scores = found.amax(dim=1).cpu().numpy().astype(np.float32)
    return scores


def holding_answer(
    passages: Sequence[Sequence[int]], chunk_tokens: int, gold: int, spans: Sequence[tuple[int, int]]
) -> Scores:
    """What an oracle chooses: the chunks of passage ``gold`` that hold an answer, then those nearest to them.

    ``spans`` are the answers' first tokens and ends in the gold passage's block; without any, its beginning is nearest.
    Other passages come last.
    """
    scores = []
    for number, passage in enumerate(passages):
        bounds = chunk_bounds(len(passage), chunk_tokens)
        if number != gold:
            scores.append(np.full(len(bounds), -float(2 * len(bounds) + 1000), dtype=np.float32))
            continue
        held = [any(start < last and end > first for first, last in spans) for start, end in bounds]
        places = np.flatnonzero(held) if any(held) else np.zeros(1, dtype=np.int64)
        scores.append(-np.abs(np.arange(len(bounds))[:, None] - places).min(axis=1).astype(np.float32))
    return np.concatenate(scores) if scores else np.zeros(0, dtype=np.float32)
