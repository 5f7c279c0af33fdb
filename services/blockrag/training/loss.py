"""Cross-entropy over a large vocabulary without keeping the logits, and a teacher's distribution beside the label.

A text's next token is one of many that could have been, and a label says so little about what the context is worth
that its noise hides it. What the decoder predicts from the uncompressed passages says it at every token (knowledge
distillation, arXiv 1503.02531, here from a prompt instead of a model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
