"""Contexts as rows of a tensor, and the losses of what is answered behind them.

A row is ``[instruction][passage 1] … [passage n][question 1, answer 1] … [question m, answer m]``. Positions are
contiguous up to a question's answer, and every question starts where the passages end, as if it stood there alone: as
the decoder composes it. Rows are padded on the left, so that answers end at the same place where each row has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blockrag.training.adaptation.visibility import FINAL, PADDING

IGNORED = -100
"""Target of a token that has no loss."""


class Branch(NamedTuple):
    """One question of a context with its answer: a last block."""

    prompt: Sequence[int]
    """Ids up to the token after which the answer starts."""
    answer: Sequence[int]
    """Ids of the answer and of the token that ends it: the target."""


@dataclass(frozen=True)
class Context:
    """Passages with one question behind them, or several."""

    instruction: tuple[int, ...]
    """Ids of the instruction block; may be empty."""
    passages: tuple[tuple[int, ...], ...]
    """Ids of each passage's block, in the prompt's order."""
    branches: tuple[Branch, ...]

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Those of the passages, behind the instruction's where there is one."""
        return (self.instruction, *self.passages) if self.instruction else self.passages

    @property
    def tokens(self) -> int:
        return sum(map(len, self.blocks)) + sum(len(prompt) + len(answer) for prompt, answer in self.branches)


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
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]


def make_batch(samples: Sequence[Context], multiple: int = 1) -> Batch:
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


@dataclass(frozen=True)
class AnswerScores:
    """What the logits of a batch say about its answers."""

    loss: Tensor
    """Scalar float32: sum of cross-entropies over answer tokens, in nats."""
    exact: Tensor
    """Scalar: answers whose every token is the most likely one after those before it. Greedy decoding would give
    exactly these."""


def score_answers(logits: Tensor, batch: Batch) -> AnswerScores:
    """Scores of ``logits`` [B, P, V], of the places that predict the batch's targets."""
    targets = batch.targets
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    wrong = (logits.argmax(-1) != targets) & (targets != IGNORED)
    missed = torch.zeros(batch.count, dtype=torch.bool, device=targets.device)
    missed[batch.answers[wrong]] = True
    return AnswerScores(loss, (~missed).sum())


def distillation(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Sum over answer tokens of p(t) · KL(teacher ‖ student), scalar float32.

    ``teacher`` [B, P, V] are the logits of the same weights under the full mask, ``student`` those under the block
    mask; no gradient flows into the teacher. The weight p(t) is the probability that the teacher gives the right
    token: where it is wrong, or guesses, there is nothing to learn from it that cross-entropy would not unlearn. Not
    normalised by the sum of the weights, so an unsure teacher counts less over all.
    """
    places = targets != IGNORED
    expected = teacher.detach()[places].float().log_softmax(-1)
    got = student[places].float().log_softmax(-1)
    trust = expected.gather(1, targets[places][:, None])[:, 0].exp()
    divergence = F.kl_div(got, expected, log_target=True, reduction="none").sum(-1)
    return (trust * divergence).sum()
