"""What cached blocks must equal, computed with a stock transformers model alone: masks, and passes over chosen slots.

``block_mask`` is the explicit block mask (Block-Attention, arXiv 2409.15355, figure 1): block-diagonal causal, and the
final block sees everything. It is one forward pass. For full and compressed blocks together there is none: A slot was
made inside its own block, at its place there, and is attended to at its place in the prompt. No single forward pass has
two positions for one key, so there are several: one per block, whose cache holds keys *rotated to their place in the
block*, and one of the final block over the chosen slots, whose keys are turned by the difference of the two places. The
served path keeps keys before rotation and turns them once; nothing of it is used here.

Source: REFRAG (arXiv 2509.01092) over Block-Attention (arXiv 2409.15355, section 2.2, whose published code re-rotates
like this).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


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
