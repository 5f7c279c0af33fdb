"""How much each chunk of a prompt deserves to be read word for word: a bundle's policies at inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockrag.errors import DataError
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.modeling.refrag.policy import ChunkPolicy, make_policy_input
from blockrag.modeling.refrag.policy_features import TokenTraits, policy_ranks


class ChunkRater:
    """A bundle's policies and its chunk encoder, for the question. Several threads may use it at a time."""

    def __init__(self, compressor: ChunkCompressor, policies: Mapping[str, ChunkPolicy], traits: TokenTraits) -> None:
        self._compressor = compressor
        self._policies = dict(policies)
        self._traits = traits

    @classmethod
    def load(cls, bundle: Bundle) -> Self:
        """Load what a bundle that can compress chooses chunks with, on the CPU. Raises ``BundleError``."""
        recorded = bundle.compression().policies
        policies = {name: ChunkPolicy.load(bundle.path / one.file) for name, one in recorded.items()}
        return cls(ChunkCompressor.load(bundle), policies, TokenTraits.of(bundle.load_tokenizer()))

    def warm_up(self) -> None:
        """Rate a made-up prompt with every policy, so that no request pays for what happens once."""
        passage = [0] * (4 * self._compressor.chunk_tokens)
        embedded = self.embed_question(passage)
        for policy in self._policies:
            self.rate(policy, [passage], [embedded], passage, embedded if self.sees_question(policy) else None, [0])

    def sees_question(self, policy: str) -> bool:
        """Whether a policy's logits depend on the question."""
        return self._policies[policy].config.query

    def embed_question(self, question: Sequence[int]) -> Tensor:
        """Chunk embeddings of a question's final block (token ids), float32 [chunks, width]."""
        [embedded] = self._compressor.embed([question])
        return embedded

    def rate(
        self,
        policy: str,
        passages: Sequence[Sequence[int]],
        embeddings: Sequence[Tensor],
        question: Sequence[int],
        question_embeddings: Tensor | None,
        ranks: Sequence[int],
    ) -> NDArray[np.float32]:
        """A logit for every chunk of all passages, in order, float32 [chunks].

        ``passages``: token ids of their blocks; ``embeddings``: of each one's chunks; ``question``: token ids of the
        final block, and ``question_embeddings`` those of its chunks, for policies that see the question; ``ranks``:
        each passage's place among the retrieved. Raises ``DataError`` when what comes out is no number.
        """
        ranks = policy_ranks(self.sees_question(policy), ranks)
        if question_embeddings is None:
            question, question_embeddings = (), torch.empty(0, self._compressor.encoder_width)
        prompt = make_policy_input(
            passages,
            embeddings,
            question,
            question_embeddings,
            chunk_tokens=self._compressor.chunk_tokens,
            traits=self._traits,
            ranks=ranks,
        )
        logits = self._policies[policy].rate(prompt)
        if not np.isfinite(logits).all():
            raise DataError(f"the policy {policy!r} gave a logit that is no finite number")
        return logits
