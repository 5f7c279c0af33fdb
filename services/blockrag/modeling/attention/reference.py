"""Attention by torch's own function, on any device and in any type: the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> bool:
    """An ``Attend`` for everything."""
    new, heads, _ = query.shape
    kv_heads = keys.shape[0]
    query, keys, values = query.to(keys.dtype), keys[:, :total], values[:, :total]
    if new == 1:
        # nothing to mask; a group's heads stand in for query positions, so that K and V are read once
        grouped = query.view(1, kv_heads, heads // kv_heads, -1)
        attended = F.scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0), scale=scaling)
        out.view_as(grouped).copy_(attended)
        return True
    mask = None
    if total > new:
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril_(total - new)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    out.copy_(attended[0].transpose(0, 1))
    return True
