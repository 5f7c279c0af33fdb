"""Learning a target's distribution from the same decoder's uncompressed prompt, beside the target itself.

A text's next token is one of many that could have been, and a label says so little about what the context is worth
that its noise hides it. What the decoder predicts from the uncompressed passages says it at every token (knowledge
distillation, arXiv 1503.02531, here from a prompt instead of a model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 256
"""Rows; two tables of their logits stay in the processor's cache."""


class _LinearDistillation(torch.autograd.Function):
    """Like ``training.loss``: the gradients are finished chunk by chunk in the forward pass.

    Cross-entropy against ``(1 - share) * label + share * taught`` has the gradient of the weighted sum of
    cross-entropy and divergence: they differ by the taught distribution's own entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, taught: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        half_head = head.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        # a decoder that is frozen needs no gradient of its head
        head_grad = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        divergences = torch.empty_like(losses)
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            logs = (hidden[rows] @ half_head.T).float().log_softmax(-1)
            wanted = (taught[rows].to(hidden.dtype) @ half_head.T).float().log_softmax(-1)
            picked = targets[rows, None]
            losses[rows] = -logs.gather(1, picked)[:, 0]
            likely = wanted.exp()
            divergences[rows] = (likely * (wanted - logs)).sum(-1)
            share = shares[rows, None]
            gradient = logs.exp_().sub_(likely.mul_(share))
            gradient.scatter_add_(1, picked, share - 1)
            half = gradient.mul_(weights[rows, None]).to(hidden.dtype)
            hidden_grad[rows] = half @ half_head
            if head_grad is not None:
                head_grad += half.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.mark_non_differentiable(losses, divergences)
        return ((losses * (1 - shares) + divergences * shares) * weights).sum(), losses, divergences

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = gradients[0]
        scaled = None if head_grad is None else head_grad * scale
        return hidden_grad * scale.to(hidden_grad.dtype), scaled, None, None, None, None


def linear_distillation(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, taught: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of next-token losses and of divergences from a teacher that shares the head.

    ``hidden`` and ``taught`` (the teacher's, without gradient) [N, width], ``head`` [vocabulary, width], ``targets``
    [N] int64, ``weights`` and ``shares`` [N] float32: a row's loss is (1 - share) of its cross-entropy and share of
    KL(teacher || student). Gives the scalar, which carries gradients to ``hidden`` and ``head``, and the N
    cross-entropies and divergences in nats (float32), which carry none.
    """
    total, losses, divergences = _LinearDistillation.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, weights, taught, shares
    )
    return total, losses, divergences
