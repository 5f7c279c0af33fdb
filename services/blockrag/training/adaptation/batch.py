"""Samples as rows of a tensor.

A row is ``[instruction][passage 1] … [passage n][final block, answer]`` with global contiguous positions, as the
decoder composes it. Rows are padded on the left, so that all answers end at the same place and the logits of the last
few positions are all that a loss on answers needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockrag.training.adaptation.masks import FINAL, PADDING
from blockrag.training.adaptation.samples import Sample

IGNORED = -100
"""Target of a token that has no loss."""


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens whose answers have at most K tokens."""

    input_ids: Tensor
    """[B, T] int64; padding is 0."""
    position_ids: Tensor
    """[B, T] int64: 0, 1, … from a row's first token on."""
    segments: Tensor
    """[B, T] int64: number of the token's block, ``FINAL`` or ``PADDING``."""
    targets: Tensor
    """[B, K] int64: ids of the last K tokens where they belong to the answer, else ``IGNORED``. Position T - K - 1 + k
    predicts the k-th."""
    tokens: int
    """Tokens that are no padding."""

    @property
    def logits_to_keep(self) -> int:
        """Positions at the end whose logits a loss on answers needs: K + 1, the last of which predicts nothing."""
        return int(self.targets.shape[1]) + 1

    @property
    def answer_tokens(self) -> int:
        """Targets of the batch."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segments=self.segments.to(device),
            targets=self.targets.to(device),
            tokens=self.tokens,
        )


def make_batch(samples: Sequence[Sample], multiple: int = 1) -> Batch:
    """One row per sample, padded to a multiple of ``multiple`` tokens."""
    width = -(-max(sample.tokens for sample in samples) // multiple) * multiple
    answers = max(len(sample.answer) for sample in samples)
    shape = (len(samples), width)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    targets = torch.full((len(samples), answers), IGNORED, dtype=torch.long)
    for row, sample in enumerate(samples):
        at = start = width - sample.tokens
        for number, block in enumerate((*sample.blocks, (*sample.prompt, *sample.answer))):
            end = at + len(block)
            ids[row, at:end] = torch.tensor(block)
            segments[row, at:end] = number if number < len(sample.blocks) else FINAL
            at = end
        positions[row, start:] = torch.arange(width - start)
        targets[row, answers - len(sample.answer) :] = torch.tensor(sample.answer)
    return Batch(ids, positions, segments, targets, sum(sample.tokens for sample in samples))
