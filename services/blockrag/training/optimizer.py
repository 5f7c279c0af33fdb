"""Optimisers and the learning rate's course."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Decay = Literal["cosine", "linear"]


def build_optimizers(model: nn.Module, name: str, learning_rate: float) -> list[torch.optim.Optimizer]:
    """The optimisers that share the trainable parameters of ``model``.

    ``adamw`` alone, or ``muon`` for the matrices inside the layers, scaled so that an update has the size AdamW's
    would have and the learning rate carries over (Moonlight, arXiv 2502.16982, section 2.2). Weight decay acts on
    matrices only.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [p for n, p in trained if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in trained if p.ndim == 2 and "embed" in n]
    vectors = [p for _, p in trained if p.ndim < 2]
    plain = {"params": vectors, "weight_decay": 0.0}
    if name == "adamw":
        decayed = {"params": matrices + embeddings, "weight_decay": 0.1}
        return [torch.optim.AdamW([decayed, plain], lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    if name == "muon":
        muon = torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        rest = {"params": embeddings, "weight_decay": 0.1}
        return [muon, torch.optim.AdamW([rest, plain], lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    raise ValueError(f"unknown optimizer {name!r}: adamw or muon")


def learning_rate_factor(
    step: int, fraction: float, warmup_steps: int, last: float = 0.03, decay: Decay = "cosine"
) -> float:
    """Factor on the peak learning rate: linear warm-up; over the budget a cosine down to ``last``, or a line to 0."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    if decay == "linear":
        return min(warmup, 1 - fraction)
    return warmup * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))))
