"""The attention used in training: on a CPU plain bf16 matrix products, elsewhere torch's fused kernels.

At training's lengths (a few hundred tokens a row) torch's fused CPU attention takes more than twice as long as two
batched products and a softmax, mostly in its backward pass. On a GPU it is the other way round, because the scores are
never written to memory. The weights do not depend on which one trained them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from blockrag.training.evidence import EvidenceLosses

TRAINING_ATTENTION = "blockrag_training"


def training_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    evidence: EvidenceLosses | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with an additive mask.

    ``query`` [B, heads, T, D], ``key`` and ``value`` [B, kv_heads, T, D], ``attention_mask`` [B, 1, T, T] in the
    query's dtype, 0 where attended and a large negative number elsewhere. Gives [B, T, heads, D]; ``evidence`` gets
    to see the scores.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    query = query.to(value.dtype)  # the rotation left queries and keys in fp32 under autocast
    key = key.to(value.dtype)
    if evidence is not None:
        evidence.look(cast(int, module.layer_idx), query, key, attention_mask, scaling)
    if query.device.type != "cpu":
        output = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return output.transpose(1, 2).contiguous(), None
    # Autocast would compute the softmax in fp32 and keep both copies; its bf16 kernel accumulates in fp32 anyway.
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query * scaling, key.transpose(2, 3))
        if attention_mask is not None:
            scores = scores + attention_mask
        output = torch.matmul(torch.softmax(scores, dim=-1), value)
    return output.transpose(1, 2).contiguous(), None


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where ``mask`` [B, 1, T, T] is true, a large negative number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -1e9)


def register() -> str:
    """Make the attention known to transformers; gives its name."""
    AttentionInterface.register(TRAINING_ATTENTION, training_attention)
    return TRAINING_ATTENTION
