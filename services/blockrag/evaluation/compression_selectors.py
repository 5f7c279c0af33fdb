"""Who chooses the chunks to expand: a bundle's policies, and beside them simple rules and an oracle.

A rule gives logits where a policy would, so the planner ranks, counts and expands for all of them alike. None learns
anything; of chunks with equal logits the earlier goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from blockrag.budget import chunk_bounds
from blockrag.compressor.compression_request import RETRIEVAL, CompressionAbility
from blockrag.compressor.rating import ChunkRater
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.modeling.refrag.policy import ChunkPolicy
from blockrag.modeling.refrag.policy_features import TokenTraits
from blockrag.modeling.template import BundleTokenizer

Scores = NDArray[np.float32]
"""[chunks]"""


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
    passages: Sequence[Sequence[int]], chunk_tokens: int, gold: Mapping[int, Sequence[tuple[int, int]]]
) -> Scores:
    """What an oracle chooses: the chunks of the passages ``gold`` that hold an answer, then those nearest to them.

    ``gold`` has the answers' first tokens and ends in each gold passage's block; without any, its beginning is nearest.
    Other passages come last.
    """
    scores = []
    for number, passage in enumerate(passages):
        bounds = chunk_bounds(len(passage), chunk_tokens)
        if number not in gold:
            scores.append(np.full(len(bounds), -float(2 * len(bounds) + 1000), dtype=np.float32))
            continue
        held = [any(start < last and end > first for first, last in gold[number]) for start, end in bounds]
        places = np.flatnonzero(held) if any(held) else np.zeros(1, dtype=np.int64)
        scores.append(-np.abs(np.arange(len(bounds))[:, None] - places).min(axis=1).astype(np.float32))
    return np.concatenate(scores) if scores else np.zeros(0, dtype=np.float32)


RANDOM = "random"
SIMILARITY = "similarity"
RULES = (RANDOM, "high perplexity", "low perplexity", RETRIEVAL, SIMILARITY)
ORACLE = "oracle"


@dataclass(frozen=True)
class Asked:
    """What the rules know of the prompt that is rated, beside what a policy sees."""

    number: int
    """Of the prompt in the run: it seeds the random choice."""
    chunk_losses: NDArray[np.float32]
    """Nats per token of each chunk under the decoder, [chunks]."""
    gold: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """For the oracle: indices of the passages that answer, with first tokens and ends of the answer in each block."""


class Selectors(ChunkRater):
    """A rater that knows the rules too. ``asked`` must be set before anything is rated; one thread at a time."""

    def __init__(self, compressor: ChunkCompressor, policies: Mapping[str, ChunkPolicy], traits: TokenTraits) -> None:
        super().__init__(compressor, policies, traits)
        self.seed = 0
        self.asked = Asked(0, np.zeros(0, dtype=np.float32))

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the bundle's policies; one that sees the question first."""
        return tuple(sorted(self._policies, key=lambda name: not self._policies[name].config.query))

    @property
    def names(self) -> tuple[str, ...]:
        """Every selector of a question."""
        return (*self.policies, *RULES, ORACLE)

    def ability(self, bundle_name: str, chunk_tokens: int) -> CompressionAbility:
        """That of a bundle which had every selector for a policy."""
        return CompressionAbility(bundle_name, chunk_tokens, frozenset(self.names) - {RETRIEVAL})

    def sees_question(self, policy: str) -> bool:
        """As in ``ChunkRater``."""
        return super().sees_question(policy) if policy in self._policies else policy == SIMILARITY

    def rate(
        self,
        policy: str,
        passages: Sequence[Sequence[int]],
        embeddings: Sequence[Tensor],
        question: Sequence[int],
        question_embeddings: Tensor | None,
        ranks: Sequence[int],
    ) -> Scores:
        """As in ``ChunkRater``. Raises ValueError for a name that is none of ``names``."""
        if policy in self._policies:
            return super().rate(policy, passages, embeddings, question, question_embeddings, ranks)
        counts, asked = [len(found) for found in embeddings], self.asked
        if policy == RANDOM:
            generator = np.random.default_rng(self.seed * 1_000_003 + asked.number)
            return generator.permutation(sum(counts)).astype(np.float32)
        if policy == "high perplexity":
            return asked.chunk_losses
        if policy == "low perplexity":
            return -asked.chunk_losses
        if policy == RETRIEVAL:
            return -np.repeat(np.asarray(ranks, dtype=np.float32), counts)
        if policy == SIMILARITY and question_embeddings is not None:
            return similar_to_question(torch.cat(list(embeddings)), question_embeddings)
        if policy == ORACLE and asked.gold:
            return holding_answer(passages, self._compressor.chunk_tokens, asked.gold)
        raise ValueError(f"selector {policy!r}: none of {', '.join(self.names)}")


def answer_spans(
    block: Sequence[int], answers: Sequence[str], chunk_tokens: int, tokenizer: BundleTokenizer
) -> list[tuple[int, int]]:
    """Runs of chunks, as few as possible, whose text holds an answer: first tokens and ends; empty where none does.

    Found in the text, because an answer's tokens depend on what stands before it.
    """
    bounds = chunk_bounds(len(block), chunk_tokens)
    for width in range(1, len(bounds) + 1):
        found = []
        for first in range(len(bounds) - width + 1):
            start, end = bounds[first][0], bounds[first + width - 1][1]
            text = tokenizer.decode(list(block[start:end]))  # type: ignore[attr-defined]
            if any(answer in text for answer in answers):
                found.append((start, end))
        if found:
            return found
    return []
