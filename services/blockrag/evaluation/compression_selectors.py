"""Who chooses the chunks to expand: trained policies, simple rules, and an oracle that knows the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from blockrag.budget import chunk_bounds
from blockrag.errors import BundleError
from blockrag.evaluation.compression_reading import EncodedPassage
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.refrag.policy import ChunkPolicy, choose_within, make_policy_input
from blockrag.modeling.refrag.policy_features import TokenTraits
from blockrag.modeling.template import BundleTokenizer
from blockrag.training.refrag.policy_baselines import (
    Scores,
    best_passages_first,
    holding_answer,
    random_scores,
    similar_to_question,
    surprising_first,
    surprising_last,
)
from blockrag.training.refrag.policy_contexts import expansion_costs
from blockrag.training.refrag.policy_samples import nearest_first

RANDOM = "random"
RULES = (RANDOM, "high perplexity", "low perplexity", "retrieval", "similarity")
ORACLE = "oracle"


@dataclass(frozen=True)
class ChoiceInput:
    """One prompt, as all selectors see it."""

    number: int
    """Of the prompt in the run: it seeds the random choice."""
    passages: Sequence[Sequence[int]]
    """Token ids of the passages' blocks."""
    embeddings: Sequence[torch.Tensor]
    question: Sequence[int]
    """Token ids of the final block."""
    question_embeddings: torch.Tensor
    ranks: Sequence[int]
    """The place that retrieval gives each passage."""
    chunk_losses: NDArray[np.float32]
    """Nats per token of each chunk under the decoder, [chunks]."""
    gold: int | None = None
    """Index of the passage that answers, for the oracle."""
    spans: Sequence[tuple[int, int]] = ()
    """First tokens and ends of the answer in its block."""

    @classmethod
    def shown(cls, passages: Sequence[EncodedPassage], **rest: object) -> ChoiceInput:
        """From encoded passages; ``rest`` are the other fields."""
        return cls(
            passages=[passage.token_ids for passage in passages],
            embeddings=[passage.embeddings for passage in passages],
            **rest,  # type: ignore[arg-type]
        )


class Selectors:
    """Scores of chunks by every selector."""

    def __init__(self, policies: Mapping[str, ChunkPolicy], traits: TokenTraits, chunk_tokens: int, seed: int) -> None:
        self._policies = policies
        self._traits = traits
        self._chunk_tokens = chunk_tokens
        self._seed = seed

    @classmethod
    def load(cls, bundle: Bundle, seed: int) -> Selectors:
        """The policies that a bundle has, and the rules. Raises BundleError for a bundle without compression."""
        if bundle.refrag is None:
            raise BundleError(f"{bundle.path}: the bundle has no chunk compression (refrag)")
        policies = {
            name: ChunkPolicy.load(bundle.path / record.file) for name, record in bundle.refrag.policies.items()
        }
        return cls(policies, TokenTraits.of(bundle.load_tokenizer()), bundle.chunk_tokens, seed)

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the bundle's policies; one that sees the question first."""
        return tuple(sorted(self._policies, key=lambda name: not self._policies[name].config.query))

    @property
    def names(self) -> tuple[str, ...]:
        """Every selector of a question."""
        return (*self.policies, *RULES, ORACLE)

    def scores(self, name: str, prompt: ChoiceInput) -> Scores:
        """One number per chunk, [chunks]; the highest are expanded first."""
        if name in self._policies:
            policy = self._policies[name]
            seen = make_policy_input(
                prompt.passages,
                prompt.embeddings,
                prompt.question,
                prompt.question_embeddings,
                chunk_tokens=self._chunk_tokens,
                traits=self._traits,
                # retrieval has seen the question; a blind policy knows the prompt's order alone
                ranks=prompt.ranks if policy.config.query else nearest_first(len(prompt.passages)),
            )
            return policy.rate(seen)
        counts = [len(found) for found in prompt.embeddings]
        if name == RANDOM:
            return random_scores(sum(counts), self._seed * 1_000_003 + prompt.number)
        if name == "high perplexity":
            return surprising_first(prompt.chunk_losses)
        if name == "low perplexity":
            return surprising_last(prompt.chunk_losses)
        if name == "retrieval":
            return best_passages_first(counts, prompt.ranks)
        if name == "similarity":
            return similar_to_question(torch.cat(list(prompt.embeddings)), prompt.question_embeddings)
        if name == ORACLE and prompt.gold is not None:
            return holding_answer(prompt.passages, self._chunk_tokens, prompt.gold, prompt.spans)
        raise ValueError(f"selector {name!r}: none of {', '.join(self.names)}")


def mask_at_rate(
    passages: Sequence[Sequence[int]], chunk_tokens: int, scores: Scores | None, rate: float
) -> NDArray[np.bool_]:
    """The mask [chunks] of the highest scores at which ``rate`` tokens stand for a slot.

    At rate 1 all chunks are expanded, from ``chunk_tokens`` on none is; ``scores`` is needed between.
    """
    costs = expansion_costs(passages, chunk_tokens)
    if rate <= 1:
        return np.ones(len(costs), dtype=np.bool_)
    if rate >= chunk_tokens or scores is None:
        return np.zeros(len(costs), dtype=np.bool_)
    budget = int(sum(map(len, passages)) / rate) - len(costs)
    return choose_within(scores, costs, max(0, budget))


def slots_of(passages: Sequence[Sequence[int]], chunk_tokens: int, mask: NDArray[np.bool_]) -> int:
    """Slots that the passages take under a mask."""
    return len(mask) + int(expansion_costs(passages, chunk_tokens)[mask].sum())


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
