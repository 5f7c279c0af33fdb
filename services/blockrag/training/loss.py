"""Cross-entropy over a large vocabulary without keeping the logits."""

from __future__ import annotations

from typing import Any

import torch

_ROWS = {"cpu": 512}  # at a time; their logits stay in the processor's cache
_ROWS_ELSEWHERE = 8192  # a GPU wants few large products


class _LinearCrossEntropy(torch.autograd.Function):
    """Per-row loss and the gradients, chunk by chunk, in the forward pass.

    The rows' weights are known before the loss is, so the gradients can be finished while a chunk's logits are still
    in cache; the backward pass only scales them. Storing [rows, vocabulary] in fp32 twice took a third of a step.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        half_head = head.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros_like(head)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        size = _ROWS.get(hidden.device.type, _ROWS_ELSEWHERE)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            logits = (hidden[rows] @ half_head.T).float()
            logits = logits.log_softmax(-1)
            picked = targets[rows, None]
            losses[rows] = -logits.gather(1, picked)[:, 0]
            gradient = logits.exp_()
            gradient.scatter_add_(1, picked, gradient.new_full(picked.shape, -1.0))
            half = gradient.mul_(weights[rows, None]).to(hidden.dtype)
            hidden_grad[rows] = half @ half_head
            head_grad += half.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = gradients[0]
        return hidden_grad * scale.to(hidden_grad.dtype), head_grad * scale, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of next-token losses.

    ``hidden`` [N, width] in bf16 or fp32, ``head`` [vocabulary, width], ``targets`` [N] int64, ``weights`` [N]
    float32. Gives the scalar sum of ``weights`` times the losses, which carries gradients to ``hidden`` and ``head``,
    and the N losses in nats (float32), which carry none.
    """
    total, losses = _LinearCrossEntropy.apply(hidden, head, targets, weights)  # type: ignore[no-untyped-call]
    return total, losses
