"""What a prompt composed of full and compressed blocks must equal, computed with a stock transformers model alone.

A slot was made inside its own block, at its place there, and is attended to at its place in the prompt. No single
forward pass has two positions for one key, so there are several: one per block, whose cache holds keys *rotated to
their place in the block*, and one of the final block over the chosen slots, whose keys are turned by the difference
of the two places. The served path keeps keys before rotation and turns them once; nothing of it is used here.

Source: REFRAG (arXiv 2509.01092) over Block-Attention (arXiv 2409.15355, section 2.2, whose published code re-rotates
like this).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class BlockPass:
    """A block alone through the stock model."""

    keys: tuple[Tensor, ...]
    """Of each layer, rotated to positions 0 … n - 1, [kv_heads, n, head_dim]."""
    values: tuple[Tensor, ...]
    """The same shape."""


@dataclass(frozen=True)
class ChosenSlot:
    """One slot of a prompt: slot ``place`` of a block's pass."""

    block: BlockPass
    place: int


@torch.inference_mode()
def pass_block(model: PreTrainedModel, embeddings: Tensor) -> BlockPass:
    """One causal forward pass over input embeddings [n, width] at positions 0 … n - 1."""
    cache = DynamicCache()
    positions = torch.arange(len(embeddings), device=model.device)[None]
    inputs = embeddings.to(model.device, model.dtype)[None]
    model.model(inputs_embeds=inputs, position_ids=positions, past_key_values=cache, use_cache=True)
    return BlockPass(
        keys=tuple(layer.keys[0] for layer in cache.layers), values=tuple(layer.values[0] for layer in cache.layers)
    )


@torch.inference_mode()
def pass_final(model: PreTrainedModel, slots: Sequence[ChosenSlot], final: Sequence[int]) -> Tensor:
    """Logits of every token of ``final``, [n, vocab], over ``slots``, of which the i-th stands at position i."""
    cache = DynamicCache()
    if slots:
        turns = torch.tensor([position - slot.place for position, slot in enumerate(slots)], device=model.device)
        cosine, sine = _turns(model, turns)
        for layer in range(len(slots[0].block.keys)):
            keys = torch.stack([slot.block.keys[layer][:, slot.place] for slot in slots], dim=1)
            values = torch.stack([slot.block.values[layer][:, slot.place] for slot in slots], dim=1)
            cache.update(_turned(keys, cosine, sine)[None], values[None], layer)
    positions = torch.arange(len(slots), len(slots) + len(final), device=model.device)
    seen = torch.arange(len(slots) + len(final), device=model.device)[None] <= positions[:, None]
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    output = model(
        input_ids=torch.tensor([list(final)], device=model.device),
        position_ids=positions[None],
        attention_mask=mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[None, None],
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = output.logits[0].float()
    return logits


def _turns(model: PreTrainedModel, turns: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own cosines and sines of ``turns`` positions, which may be negative; [n, head_dim] in float32."""
    rotary = model.model.rotary_emb
    cosine, sine = rotary(torch.zeros(1, device=turns.device), turns[None].float())
    # yarn scales each rotated key, and these were rotated once already
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    return cosine[0] / scaling, sine[0] / scaling


def _turned(keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding as RoFormer's equation 34 has it, over halves; computed in float32."""
    wide = keys.float()
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cosine + torch.cat([-second, first], dim=-1) * sine
    return turned.to(keys.dtype)
