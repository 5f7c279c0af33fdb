"""What a token of a training row may see: the block mask and the full mask, dense or for FlexAttention.

One rule serves both forms, over the segment of each token: a token sees earlier tokens of its own segment, and a
token of a final block sees every earlier token of the passages (arXiv 2409.15355, figure 1). A row may have several
final blocks, which do not see one another. Under the full mask all passages are one segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from blockrag.errors import SetupError
from blockrag.training.adaptation.block_config import AttentionKind
from blockrag.training.attention import additive_mask
from blockrag.training.attention import register as register_dense

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


class TrainingAttention:
    """How a model attends in training: FlexAttention where its backward pass exists, else a dense mask."""

    def __init__(self, wanted: AttentionKind, device: torch.device) -> None:
        """Raises SetupError when FlexAttention is asked for on a device without its backward pass."""
        if wanted == "flex" and device.type != "cuda":
            raise SetupError(f"attention 'flex': torch has no backward pass of FlexAttention on {device.type}")
        self.flex = wanted == "flex" or (wanted == "auto" and device.type == "cuda")
        self._cpu = device.type == "cpu"

    @property
    def multiple(self) -> int:
        """What rows are padded to a multiple of."""
        return FLEX_MULTIPLE if self.flex else 1

    def install(self, model: PreTrainedModel) -> None:
        """Let ``model`` attend this way."""
        if self.flex:
            model.set_attn_implementation(FLEX_ATTENTION)
        else:
            # on a CPU two plain products beat torch's fused attention twofold; on a GPU it is the other way round
            model.set_attn_implementation(register_dense() if self._cpu else "sdpa")

    def mask(self, segments: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor | BlockMask:
        """What the model takes as ``attention_mask`` for rows of ``segments`` [B, T] on the model's device.

        ``dtype`` is that of the values.
        """
        seen = mask_segments(segments, mask)
        if self.flex:
            return flex_mask(seen)
        allowed = dense_mask(seen)
        return additive_mask(allowed, dtype) if self._cpu else allowed
