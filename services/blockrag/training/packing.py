"""Packing contexts into rows: one context per row, all its questions behind it.

A row is ``[instruction][passage 1] ... [passage n][question 1 answer 1][question 2 answer 2] ...``. Every question
sees the context and itself, and its positions start right after the context, as if it stood there alone. So one pass
over the passages serves several questions. A context may leave gaps between the positions of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from blockrag.training.contexts import Context
from blockrag.training.evidence import Evidence, find_evidence

IGNORED = -100
"""Target of a token that has no loss."""


@dataclass(frozen=True)
class Weights:
    """Weight of a token's loss by where it stands; an answer's tokens have weight 1."""

    passage: float = 0.25
    question: float = 0.25


@dataclass(frozen=True)
class PackedBatch:
    """Rows of a batch; B rows of T tokens."""

    input_ids: torch.Tensor
    """[B, T] int64; padding is 0."""
    position_ids: torch.Tensor
    """[B, T] int64; a question's start where its context's end."""
    segments: torch.Tensor
    """[B, T] int64; number of the block or question, equal for all blocks under the full mask; padding is -1."""
    in_context: torch.Tensor
    """[B, T] bool; true for the context's tokens."""
    targets: torch.Tensor
    """[B, T] int64; the next token's id, or ``IGNORED``."""
    weights: torch.Tensor
    """[B, T] float32; weight of the loss at this place."""
    branches: torch.Tensor
    """[B, T] int64; number of the question whose answer token is predicted here, counted through the batch; else -1."""

    evidence: tuple[Evidence, ...] = ()
    """Of each row: where the answers of its questions stand."""

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.segments >= 0).sum())

    def mask(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """[B, 1, T, T] bool; true where the query (third axis) attends to the key (last axis).

        Causal inside a segment, and from every question to the whole context. Padding attends to padding, so that no
        query is left without a key. Made where it is needed: it is T times as large as everything else here.
        """
        segments, in_context = self.segments.to(device), self.in_context.to(device)
        width = segments.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        same = segments[:, :, None] == segments[:, None, :]
        question = ~in_context & (segments >= 0)
        return (causal & (same | (question[:, :, None] & in_context[:, None, :])))[:, None]


def pack(contexts: list[Context], *, block: bool, weights: Weights, multiple: int = 1) -> PackedBatch:
    """Pack one row per context; ``block`` chooses the block mask, else the full causal one.

    Rows are padded to a multiple of ``multiple`` tokens.
    """
    longest = max(row_tokens(context) for context in contexts)
    width = -(-longest // multiple) * multiple
    shape = (len(contexts), width)
    ids = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)
    in_context = np.zeros(shape, bool)
    targets = np.full(shape, IGNORED, np.int64)
    loss = np.zeros(shape, np.float32)
    branches = np.full(shape, -1, np.int64)
    evidence: list[Evidence] = []
    number = 0
    for row, context in enumerate(contexts):
        at = skipped = 0
        gaps = context.gaps or (0,) * (len(context.blocks) + 1)
        for segment, tokens in enumerate(context.blocks):
            end = at + len(tokens)
            skipped += gaps[segment]
            positions[row, at:end] = skipped + np.arange(at, end)
            ids[row, at:end] = tokens
            segments[row, at:end] = segment if block else 0
            # Under the block mask a block's last token is seen by no block, so it has nothing to predict.
            targets[row, at : end - 1] = tokens[1:]
            loss[row, at : end - 1] = weights.passage
            at = end
        in_context[row, :at] = True
        asked_at = at + skipped + gaps[-1]
        last_places: list[int] = []
        for branch_number, branch in enumerate(context.branches):
            tokens = [*branch.prompt, *branch.answer]
            end, asked = at + len(tokens), at + len(branch.prompt) - 1
            last_places.append(asked)
            ids[row, at:end] = tokens
            positions[row, at:end] = asked_at + np.arange(len(tokens))
            segments[row, at:end] = len(context.blocks) + branch_number
            targets[row, at : end - 1] = tokens[1:]
            loss[row, at:asked] = weights.question
            loss[row, asked : end - 1] = 1.0
            branches[row, asked : end - 1] = number
            at, number = end, number + 1
        answers = [branch.answer[:-1] for branch in context.branches]
        evidence.append(find_evidence(context.blocks, last_places, answers, width))
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        in_context=torch.from_numpy(in_context),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(loss),
        branches=torch.from_numpy(branches),
        evidence=tuple(evidence),
    )


def row_tokens(context: Context) -> int:
    """Tokens of a context's row without padding."""
    asked = sum(len(branch.prompt) + len(branch.answer) for branch in context.branches)
    return sum(len(block) for block in context.blocks) + asked
