"""The attention used in training: on a CPU plain bf16 matrix products by tiles, elsewhere torch's fused kernels.

At training's lengths (hundreds to a few thousand tokens a row) torch's fused CPU attention takes more than twice as
long as two batched products and a softmax, mostly in its backward pass. On a GPU it is the other way round, because the
scores are never written to memory. The weights do not depend on which one trained them.

Most of a row's mask is empty: passages do not see one another, questions neither. So queries are taken some at a time,
with the keys that any of them attends to, and the scores of a tile stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

TRAINING_ATTENTION = "blockrag_training"
_TILE = 256
"""Queries of a tile: half and twice as many are slower."""


@dataclass(frozen=True)
class _Tile:
    """Neighbouring queries and all keys that any of them attends to, in any row of the batch."""

    queries: slice
    keys: torch.Tensor
    """[K] int64."""
    mask: torch.Tensor
    """[B, 1, group * queries, K], additive; the same for every head of a group."""


def _tiles(mask: torch.Tensor, group: int) -> list[_Tile]:
    """The tiles of an additive mask [B, 1, T, T] for groups of so many heads.

    They stay with the mask, because every layer gets the same one.
    """
    found: list[_Tile] | None = getattr(mask, "tiles", None)
    if found is None:
        attended = (mask == 0).any(0)[0]
        found = []
        for start in range(0, mask.shape[2], _TILE):
            queries = slice(start, start + _TILE)
            keys = attended[queries].any(0).nonzero().flatten()
            found.append(_Tile(queries, keys, mask[:, :, queries].index_select(3, keys).repeat(1, 1, group, 1)))
        mask.tiles = found  # type: ignore[attr-defined]
    return found


def training_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with an additive mask.

    ``query`` [B, heads, T, D], ``key`` and ``value`` [B, kv_heads, T, D], ``attention_mask`` [B, 1, T, T] in the
    query's dtype, 0 where attended and a large negative number elsewhere. Gives [B, T, heads, D].
    """
    query = query.to(value.dtype)  # the rotation left queries and keys in fp32 under autocast
    key = key.to(value.dtype)
    group = query.shape[1] // key.shape[1]
    if query.device.type != "cpu":
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=group > 1
        )
        return output.transpose(1, 2).contiguous(), None
    # Autocast would compute the softmax in fp32 and keep both copies; its bf16 kernel accumulates in fp32 anyway.
    with torch.autocast("cpu", enabled=False):
        grouped = (query * scaling).unflatten(1, (key.shape[1], group))
        outputs = []
        for tile in _tiles(attention_mask, group):
            # The heads of a group stand side by side, so that their keys and values are not repeated.
            queries = grouped[:, :, :, tile.queries]
            keys, values = key.index_select(2, tile.keys), value.index_select(2, tile.keys)
            scores = torch.matmul(queries.flatten(2, 3), keys.transpose(2, 3)).add_(tile.mask)
            outputs.append(torch.matmul(torch.softmax(scores, dim=-1), values).view(queries.shape))
        output = torch.cat(outputs, dim=3).flatten(1, 2)
    return output.transpose(1, 2).contiguous(), None


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where ``mask`` [B, 1, T, T] is true, a large negative number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -1e9)


def register() -> str:
    """Make the attention known to transformers; gives its name."""
    AttentionInterface.register(TRAINING_ATTENTION, training_attention)
    return TRAINING_ATTENTION
