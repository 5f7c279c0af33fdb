"""K and V of blocks in eight bits: keys by channel, values by slot, as in KIVI (arXiv 2402.02750, section 3).

Keys have channels that are large in every slot, so before rotation each channel has a step and a middle of its own over
the block's slots. Values have no such channels; each slot has a step of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127
_LEAST = 2.0**-100
"""So that zeros divide by something."""

Scales = tuple[Tensor, Tensor]
"""Of keys, bfloat16 [2, layers, kv_heads, head_dim], the step and the middle of each channel; and of values, bfloat16
[layers, kv_heads, n], the step of each slot."""


def quantised(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Scales]:
    """``keys`` and ``values``, [layers, kv_heads, n, head_dim] each, as int8 of the same shape, and their scales."""
    wide = keys.float()
    middles = ((wide.amax(2) + wide.amin(2)) / 2).bfloat16()
    centred = wide - middles.float()[:, :, None]
    steps = (centred.abs().amax(2) / _LARGEST).clamp_min(_LEAST).bfloat16()
    narrow_keys = _rounded(centred, steps.float()[:, :, None])
    wide = values.float()
    by_slot = (wide.abs().amax(3) / _LARGEST).clamp_min(_LEAST).bfloat16()
    narrow_values = _rounded(wide, by_slot.float()[..., None])
    return narrow_keys, narrow_values, (torch.stack([steps, middles]), by_slot)


def widened(slots: Tensor, start: int, stop: int, scales: Scales) -> Tensor:
    """Slots ``start`` to ``stop`` of int8 [2, layers, kv_heads, n, head_dim] in float32."""
    (steps, middles), by_slot = scales
    keys = slots[0, :, :, start:stop].float() * steps.float()[:, :, None] + middles.float()[:, :, None]
    values = slots[1, :, :, start:stop].float() * by_slot[:, :, start:stop, None].float()
    return torch.stack([keys, values])


def _rounded(numbers: Tensor, steps: Tensor) -> Tensor:
    return (numbers / steps).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
