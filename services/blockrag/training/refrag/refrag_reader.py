"""Decoder, chunk encoder and projector together: what the samples of a step's part say about their targets.

By cross-entropy over a large vocabulary without keeping the logits, and a teacher's distribution beside the label. A
text's next token is one of many that could have been, and a label says so little about what the context is worth that
its noise hides it. What the decoder predicts from the uncompressed passages says it at every token (knowledge
distillation, arXiv 1503.02531, here from a prompt instead of a model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from blockrag.budget import chunk_bounds
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.training.refrag.chunk_masks import constant_mask, view_slots
from blockrag.training.refrag.composed import ComposedDecoder, ComposedPrompt, FinalStates, SlotBank
from blockrag.training.refrag.stage_samples import Kind, RefragSample

_ROWS_ON_CPU = 512  # at a time; their logits stay in the processor's cache
_ROWS_ELSEWHERE = 8192  # a GPU wants few large products


class _LinearCrossEntropy(torch.autograd.Function):
    """Per-row loss and the gradients, chunk by chunk, in the forward pass.

    The rows' weights are known before the loss is, so the gradients can be finished while a chunk's logits are still
    in cache; the backward pass only scales them. Storing [rows, vocabulary] in fp32 twice took a third of a step.
    Cross-entropy against ``(1 - share) * label + share * taught`` has the gradient of the weighted sum of
    cross-entropy and divergence: they differ by the taught distribution's own entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        taught: Tensor | None,
        shares: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        half_head = head.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        # a decoder that is frozen needs no gradient of its head
        head_grad = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        divergences = torch.zeros_like(losses)
        size = _ROWS_ON_CPU if hidden.device.type == "cpu" else _ROWS_ELSEWHERE
        if taught is not None:
            size //= 2  # of two tables of logits
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            logs = (hidden[rows] @ half_head.T).float().log_softmax(-1)
            picked = targets[rows, None]
            losses[rows] = -logs.gather(1, picked)[:, 0]
            if taught is None or shares is None:
                gradient = logs.exp_()
                gradient.scatter_add_(1, picked, gradient.new_full(picked.shape, -1.0))
            else:
                share = shares[rows, None]
                wanted = (taught[rows].to(hidden.dtype) @ half_head.T).float().log_softmax(-1)
                likely = wanted.exp()
                divergences[rows] = (likely * (wanted - logs)).sum(-1)
                gradient = logs.exp_().sub_(likely.mul_(share))
                gradient.scatter_add_(1, picked, share - 1)
            half = gradient.mul_(weights[rows, None]).to(hidden.dtype)
            hidden_grad[rows] = half @ half_head
            if head_grad is not None:
                head_grad += half.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.mark_non_differentiable(losses, divergences)
        mixed = losses if shares is None else losses * (1 - shares) + divergences * shares
        return (mixed * weights).sum(), losses, divergences

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = gradients[0]
        scaled = None if head_grad is None else head_grad * scale
        return hidden_grad * scale.to(hidden_grad.dtype), scaled, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    taught: Tensor | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of next-token losses and, with ``taught``, of divergences from a teacher that shares the head.

    ``hidden`` [N, width] in bf16 or fp32 and ``taught`` (the teacher's, without gradient) alike, ``head`` [vocabulary,
    width], ``targets`` [N] int64, ``weights`` and ``shares`` [N] float32: a row's loss is (1 - share) of its
    cross-entropy and share of KL(teacher || student); ``taught`` and ``shares`` are given both or neither. Gives the
    scalar, which carries gradients to ``hidden`` and ``head``, and the N cross-entropies and divergences in nats
    (float32; 0 without a teacher), which carry none.
    """
    total, losses, divergences = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, weights, taught, shares
    )
    return total, losses, divergences


class SampleLosses(NamedTuple):
    """Losses of the target tokens of samples, N of them."""

    total: Tensor
    """Scalar: the sum of weights times losses; carries gradients."""
    losses: Tensor
    """[N] float32, nats."""
    divergences: Tensor
    """[N] float32, nats from what the uncompressed prompt predicts; 0 where nothing is learnt from it."""
    kinds: NDArray[np.str_]
    """[N]: the kind of the sample that each target belongs to."""


class SampleScores(NamedTuple):
    """What the views of samples get right, one row per branch, in order."""

    losses: Tensor
    """[branches] float32: nats of the whole target."""
    tokens: Tensor
    """[branches] int64: tokens of the target."""
    right: Tensor
    """[branches] int64: target tokens that are the likeliest ones after those before them."""


class _Blocks(NamedTuple):
    """Slots of the blocks of samples, and the numbers of each block's in the bank, by sample and passage."""

    bank: SlotBank
    full: dict[tuple[int, int], NDArray[np.int64]]
    """Passage -1 is what opens the prompt."""
    compressed: dict[tuple[int, int], NDArray[np.int64]]


class RefragReader(nn.Module):
    """A reader of compositions. ``forward`` is the only way in, so that its parameters can be sharded as a whole."""

    def __init__(
        self, decoder: ComposedDecoder, encoder: ChunkEncoder, projector: Projector, chunk_tokens: int
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder
        self.projector = projector
        self.chunk_tokens = chunk_tokens
        """k"""
        self.distillation = 0.0
        """Share of the divergence from the uncompressed prompt in the loss of texts. Answers have none: their label
        says what is right, and the uncompressed prompt is wrong where it differs."""
        self.sharded = False
        """Whether FSDP shards this module. Then every parameter gets a gradient from every part, if only of nothing:
        workers exchange what they have gradients of, and a part may compress no chunk or no other one."""

    def forward(
        self, samples: Sequence[RefragSample], weights: Mapping[Kind, float] | None
    ) -> SampleLosses | SampleScores:
        """Losses of all targets, each weighted by its kind's weight; without ``weights``, scores."""
        learns = weights is not None and self.distillation > 0
        blocks = self._read_blocks(samples, learns)
        states = self.decoder.final(blocks.bank, self._prompts(samples, blocks))
        if weights is None:
            return self._scores(states)
        kinds = np.array(
            [s.kind for s in samples for view in s.views for branch in view.branches for _ in branch.answer]
        )
        weighted = torch.tensor([weights[kind] for kind in kinds], dtype=torch.float32, device=states.hidden.device)
        head = self.decoder.head
        hidden = states.hidden
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        taught, shares = self._taught(samples, blocks, states) if learns else (None, None)
        total, losses, divergences = linear_cross_entropy(hidden, head, states.targets, weighted, taught, shares)
        if shares is not None:
            divergences = divergences * (shares > 0)
        if self.sharded:
            total = total + 0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        return SampleLosses(total, losses, divergences, kinds)

    @torch.no_grad()
    def _taught(self, samples: Sequence[RefragSample], blocks: _Blocks, states: FinalStates) -> tuple[Tensor, Tensor]:
        """Hidden states of the targets after the uncompressed passages, and the share of learning from them."""
        branches = [_is_taught(sample) for sample in samples for view in sample.views for _ in view.branches]
        rows = torch.tensor(branches, device=states.hidden.device)[states.branches]
        hidden = torch.zeros_like(states.hidden)
        prompts = self._prompts(samples, blocks, teaching=True)
        if prompts:
            hidden[rows] = self.decoder.final(blocks.bank, prompts).hidden.to(hidden.dtype)
        return hidden, rows * self.distillation

    def _read_blocks(self, samples: Sequence[RefragSample], taught: bool) -> _Blocks:
        """Block passes of all that the samples' views show; with ``taught``, of what teaches them too."""
        full: dict[tuple[int, int], Sequence[int]] = {}
        compressed: dict[tuple[int, int], Sequence[int]] = {}
        for number, sample in enumerate(samples):
            opening = [*sample.instruction, *(chain.from_iterable(sample.passages) if sample.whole else ())]
            if opening:
                full[number, -1] = opening
            for place, passage in enumerate(sample.passages):
                shown = [view.mask[place] for view in sample.views if place < len(view.mask)]
                if any((taught and _is_taught(sample)) or mask.any() for mask in shown):
                    full[number, place] = passage
                if not all(mask.all() for mask in shown):
                    compressed[number, place] = passage
        banks = [self.decoder.encode(list(full.values()))]
        if compressed:
            banks.append(self.decoder.encode_embeddings(self._input_embeddings(list(compressed.values()))))
        bank = SlotBank.join(banks)
        slots = [bank.block(number) for number in range(len(bank.spans))]
        of_compressed = slots[len(full) :]
        return _Blocks(bank, dict(zip(full, slots, strict=False)), dict(zip(compressed, of_compressed, strict=True)))

    def _prompts(
        self, samples: Sequence[RefragSample], blocks: _Blocks, *, teaching: bool = False
    ) -> list[ComposedPrompt]:
        """One prompt per view; ``teaching``: the uncompressed ones, of the samples that learn from them."""
        prompts = []
        for number, sample in enumerate(samples):
            if teaching and not _is_taught(sample):
                continue
            opening = [blocks.full[number, -1]] if (number, -1) in blocks.full else []
            places = [(number, passage) for passage in range(len(sample.passages))]
            full = list(map(blocks.full.get, places))
            short = list(map(blocks.compressed.get, places))
            for view in sample.views:
                mask = view.mask
                if teaching:
                    mask = constant_mask(sample.passages[: len(mask)], self.chunk_tokens, True)
                passages = view_slots(full, short, mask, self.chunk_tokens)
                composed = [*opening, *passages]
                slots = np.concatenate(composed) if composed else np.zeros(0, np.int64)
                prompts.append(ComposedPrompt(slots, view.branches))
        return prompts

    def _input_embeddings(self, blocks: Sequence[Sequence[int]]) -> list[Tensor]:
        """Projected chunk embeddings of each block, [m, width]."""
        bounds = [chunk_bounds(len(block), self.chunk_tokens) for block in blocks]
        chunks = [block[start:end] for block, pieces in zip(blocks, bounds, strict=True) for start, end in pieces]
        return list(self.projector(self.encoder(chunks)).split([len(pieces) for pieces in bounds]))

    def _scores(self, states: FinalStates) -> SampleScores:
        logits = self.decoder.logits(states)
        losses = F.cross_entropy(logits, states.targets, reduction="none")
        right = (logits.argmax(-1) == states.targets).long()
        count = int(states.branches.max()) + 1
        empty = torch.zeros(count, dtype=torch.long, device=losses.device)
        return SampleScores(
            losses=torch.zeros(count, device=losses.device).index_add(0, states.branches, losses),
            tokens=empty.index_add(0, states.branches, torch.ones_like(right)),
            right=empty.index_add(0, states.branches, right),
        )


def _is_taught(sample: RefragSample) -> bool:
    return sample.kind == "text" and not sample.whole
