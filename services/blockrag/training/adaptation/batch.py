"""Samples as rows of a tensor.

A row is ``[instruction][passage 1] … [passage n][question 1, answer 1] … [question m, answer m]``. Positions are
contiguous up to a question's answer, and every question starts where the passages end, as if it stood there alone: as
the decoder composes it. Rows are padded on the left, so that answers end at the same place where each row has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from blockrag.training.adaptation.masks import FINAL, PADDING

IGNORED = -100
"""Target of a token that has no loss."""
Branch = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a question's final block and of its answer, with the token that ends it."""


class Prompts(Protocol):
    """Passages with one question behind them, or several."""

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the instruction block and of each passage's block."""

    @property
    def branches(self) -> tuple[Branch, ...]: ...

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, A answers, whose tokens are predicted at P of the T places."""

    input_ids: Tensor
    """[B, T] int64; padding is 0."""
    position_ids: Tensor
    """[B, T] int64: 0, 1, … from a row's first token on; a question's start where its passages end."""
    segments: Tensor
    """[B, T] int64: number of the token's block, ``FINAL`` plus the question's number, or ``PADDING``."""
    predicted: Tensor
    """[P] int64, ascending: places in a row at which, in any row, the next token belongs to an answer."""
    targets: Tensor
    """[B, P] int64: the next token's id where it belongs to an answer, else ``IGNORED``."""
    answers: Tensor
    """[B, P] int64: number of the answer that it belongs to, 0 to A - 1."""
    count: int
    """A."""
    tokens: int
    """Tokens that are no padding."""

    @property
    def answer_tokens(self) -> int:
        """Targets of the batch."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def make_batch(samples: Sequence[Prompts], multiple: int = 1) -> Batch:
    """One row per sample, padded to a multiple of ``multiple`` tokens."""
    width = -(-max(sample.tokens for sample in samples) // multiple) * multiple
    shape = (len(samples), width)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    targets = torch.full(shape, IGNORED, dtype=torch.long)
    answers = torch.zeros(shape, dtype=torch.long)
    count = 0
    for row, sample in enumerate(samples):
        at = width - sample.tokens
        place = 0
        for number, block in enumerate(sample.blocks):
            end = at + len(block)
            ids[row, at:end] = torch.tensor(block)
            positions[row, at:end] = torch.arange(place, place + len(block))
            segments[row, at:end] = number
            at, place = end, place + len(block)
        for number, (prompt, answer) in enumerate(sample.branches):
            end = at + len(prompt) + len(answer)
            ids[row, at:end] = torch.tensor((*prompt, *answer))
            positions[row, at:end] = torch.arange(place, place + end - at)
            segments[row, at:end] = FINAL + number
            first = at + len(prompt) - 1
            targets[row, first : end - 1] = torch.tensor(answer)
            answers[row, first : end - 1] = count
            count += 1
            at = end
    predicted = (targets != IGNORED).any(0).nonzero().flatten()
    return Batch(
        input_ids=ids,
        position_ids=positions,
        segments=segments,
        predicted=predicted,
        targets=targets[:, predicted],
        answers=answers[:, predicted],
        count=count,
        tokens=sum(sample.tokens for sample in samples),
    )
