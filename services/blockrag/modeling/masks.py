"""The explicit block mask: what cached block attention must equal, as one forward pass of a stock model.

Source: Block-Attention (arXiv 2409.15355, figure 1): block-diagonal causal, and the final block sees everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def block_mask(block_lengths: Sequence[int], final_length: int) -> Tensor:
    """Which position may attend to which: bool [1, 1, T, T], T = sum of ``block_lengths`` + ``final_length``.

    Positions are global and contiguous over blocks and the final block.
    """
    if any(length <= 0 for length in block_lengths) or final_length < 0:
        raise ValueError("a block has at least one token")
    total = sum(block_lengths) + final_length
    allowed = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for length in block_lengths:
        end = start + length
        allowed[start:end, start:end] = True
        start = end
    allowed[start:] = True
    return allowed.tril_()[None, None]


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed and the type's least number where not, as transformers takes a 4-D mask."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def stock_mask(model: PreTrainedModel, allowed: Tensor) -> Tensor | dict[str, Tensor]:
    """``allowed`` [1, 1, T, T] as a stock model takes it: one additive mask, or one by the kind of layer.

    A layer with a window sees what is both allowed and in its window.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    allowed = allowed.to(model.device)
    whole = additive_mask(allowed, model.dtype)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return whole
    places = torch.arange(allowed.shape[-1], device=model.device)
    near = additive_mask(allowed & (places > places[:, None] - int(window)), model.dtype)
    masks = {"full_attention": whole, "sliding_attention": near}
    return masks if kinds else near
