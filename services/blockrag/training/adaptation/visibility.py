"""What a token of a training row may see, and the attention that sees it: the block mask and the full mask.

One rule serves the dense mask and FlexAttention, over the segment of each token: a token sees earlier tokens of its own
segment, and a token of a final block sees every earlier token of the passages (arXiv 2409.15355, figure 1). A row may
have several final blocks, which do not see one another. Under the full mask all passages are one segment.

On a CPU attention is plain bf16 matrix products by tiles. At training's lengths (hundreds to a few thousand tokens a
row) torch's fused attention takes more than twice as long there as two batched products and a softmax, mostly in its
backward pass. On a GPU it is the other way round, because the scores are never written to memory. The weights do not
depend on which one trained them. Most of a row's mask is empty: passages do not see one another, questions neither. So
queries are taken some at a time, with the keys that any of them attends to, and a tile's scores stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from blockrag.errors import SetupError
from blockrag.training.adaptation.block_config import AttentionKind

TRAINING_ATTENTION = "blockrag_training"
_TILE = 256
"""Queries of a tile: half and twice as many are slower."""


@dataclass(frozen=True)
class _Tile:
    """Neighbouring queries and all keys that any of them attends to, in any row of the batch."""

    queries: slice
    keys: Tensor
    """[K] int64."""
    mask: Tensor
    """[B, 1, group * queries, K], additive; the same for every head of a group."""


def _tiles(mask: Tensor, group: int) -> list[_Tile]:
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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention with an additive mask, on a CPU.

    ``query`` [B, heads, T, D], ``key`` and ``value`` [B, kv_heads, T, D], ``attention_mask`` [B, 1, T, T] in the
    query's dtype, 0 where attended and a large negative number elsewhere. Gives [B, T, heads, D].
    """
    query = query.to(value.dtype)  # the rotation left queries and keys in fp32 under autocast
    key = key.to(value.dtype)
    group = query.shape[1] // key.shape[1]
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


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` [B, 1, T, T] is true, a large negative number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -1e9)


FINAL = 1_000_000
"""Segment of the first final block, beyond the number of any block; the next ones have the numbers after it."""
PADDING = -1
"""Segment of padding, which sees itself, so that no row of scores is empty, and is seen by nothing else."""

FLEX_ATTENTION = "blockrag_flex"
"""Name in transformers' ``AttentionInterface``."""
FLEX_MULTIPLE = 128
"""Rows are padded to a multiple of this for FlexAttention: whole tiles, and few shapes to compile for."""

Mask = Literal["block", "full"]


def mask_segments(segments: Tensor, mask: Mask) -> Tensor:
    """Segments [B, T] as a mask sees them: unchanged, or all passages of a row in one."""
    return segments if mask == "block" else torch.where((segments >= 0) & (segments < FINAL), 0, segments)


def visible(segments: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as FlexAttention takes it: (row, head, query position, key position) to bool."""

    def rule(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = segments[row, query], segments[row, key]
        in_passages = (of_key != PADDING) & (of_key < FINAL)
        return (query >= key) & ((of_query == of_key) | ((of_query >= FINAL) & in_passages))

    return rule


def dense_mask(segments: Tensor) -> Tensor:
    """The rule as a tensor: bool [B, 1, T, T], true where the query (third axis) sees the key (last axis)."""
    rows, width = segments.shape
    place = torch.arange(width, device=segments.device)
    row = torch.arange(rows, device=segments.device)
    return visible(segments)(row[:, None, None], row, place[None, :, None], place[None, None, :]).unsqueeze(1)


def flex_mask(segments: Tensor) -> BlockMask:
    """The rule as FlexAttention's tiles; T should be a multiple of ``FLEX_MULTIPLE``."""
    rows, width = segments.shape
    return create_block_mask(visible(segments), rows, None, width, width, device=segments.device)


def flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' FlexAttention under autocast, where the rotation leaves queries and keys in float32."""
    attended: tuple[Tensor, Tensor | None] = flex_attention_forward(
        module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **options
    )
    return attended


AttentionInterface.register(FLEX_ATTENTION, flex_attention)
AttentionInterface.register(TRAINING_ATTENTION, training_attention)


class TrainingAttention:
    """How a model attends in training: FlexAttention where its backward pass exists, else a dense mask."""

    def __init__(self, wanted: AttentionKind, device: torch.device) -> None:
        """Raises SetupError when FlexAttention is asked for on a device without its backward pass."""
        if wanted == "flex" and device.type != "cuda":
            raise SetupError(f"attention 'flex': torch has no backward pass of FlexAttention on {device.type}")
        self.flex = wanted == "flex" or (wanted == "auto" and device.type == "cuda")
        self._cpu = device.type == "cpu"
        self.multiple = FLEX_MULTIPLE if self.flex else 1
        """What rows are padded to a multiple of."""

    def install(self, model: PreTrainedModel) -> None:
        """Let ``model`` attend this way."""
        without = TRAINING_ATTENTION if self._cpu else "sdpa"
        model.set_attn_implementation(FLEX_ATTENTION if self.flex else without)

    def mask(self, segments: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor | BlockMask:
        """What the model takes as ``attention_mask`` for rows of ``segments`` [B, T] on the model's device.

        ``dtype`` is that of the values.
        """
        seen = mask_segments(segments, mask)
        if self.flex:
            return flex_mask(seen)
        allowed = dense_mask(seen)
        return additive_mask(allowed, dtype) if self._cpu else allowed
