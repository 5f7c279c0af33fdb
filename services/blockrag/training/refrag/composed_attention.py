"""Attention of composed prompts: keys arrive before rotation, are kept, and are rotated for the places they get.

A model's attention function asks the *composition* that travels with the pass: a ``BlockPass`` reads blocks and keeps
their K and V, a ``FinalPass`` reads questions over slots that block passes kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from blockrag.modeling.rotary import to_pairs

COMPOSED_ATTENTION = "blockrag_composed"
"""Name in transformers' ``AttentionInterface``. No mask function has it, so transformers builds no mask."""

_MASKED = -1e9


class BlockPass:
    """Attention of a pass over padded blocks, which keeps K and V. Padding stands at the end, where none sees it."""

    def __init__(self, phases: Tensor, layers: int) -> None:
        """``phases`` [T, head_dim / 2]."""
        self._phases = phases
        self._layers = layers
        self._kept: dict[int, Tensor] = {}

    def kept(self) -> Tensor:
        """What was kept of all rows: [B * T, 2 * layers, kv_heads, head_dim]."""
        parts = [self._kept[number].transpose(1, 2) for number in range(2 * self._layers)]
        return torch.stack(parts, dim=2).flatten(0, 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self._kept[layer], self._kept[self._layers + layer] = key, value
        if layer == self._layers - 1:
            return torch.zeros_like(query)  # what follows the last layer's K and V is read by nobody
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril_()
        return _attention(_rotate(query, self._phases), _rotate(key, self._phases), value, seen[None], scaling)


class FinalPass:
    """Attention of a pass over branches, which see their prompt's slots."""

    def __init__(self, slots: tuple[Tensor, ...], slot_phases: Tensor, phases: Tensor, visible: Tensor) -> None:
        """``slots``: K of every layer, then V, each [P, L, kv_heads, head_dim]; ``slot_phases`` [L, head_dim / 2],
        ``phases`` [P, F, head_dim / 2], ``visible`` [P, F, L + F] bool."""
        self._slots = slots
        self._slot_phases = slot_phases
        self._phases = phases
        self._visible = visible

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        cached_key = self._slots[layer].transpose(1, 2)
        cached_value = self._slots[len(self._slots) // 2 + layer].transpose(1, 2)
        phases = self._phases.unsqueeze(1)
        rotated = _rotate(cached_key, self._slot_phases).to(key.dtype)
        keys = torch.cat([rotated, _rotate(key, phases)], dim=2)
        values = torch.cat([cached_value.to(value.dtype), value], dim=2)
        return _attention(_rotate(query, phases), keys, values, self._visible, scaling)


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """query [B, heads, T, d], key and value [B, kv_heads, N, d], ``visible`` [B or 1, T, N]; gives [B, heads, T, d].

    On a CPU two plain products and a softmax take half the time of torch's fused attention, backward pass included;
    the heads of a group stand side by side, so that K and V are not repeated.
    """
    with torch.autocast(query.device.type, enabled=False):
        if query.device.type != "cpu":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=visible.unsqueeze(1), scale=scaling, enable_gqa=True
            )
        rows, heads, tokens, head_dim = query.shape
        group = heads // key.shape[1]
        grouped = (query * scaling).reshape(rows, key.shape[1], group * tokens, head_dim)
        scores = torch.matmul(grouped, key.transpose(2, 3)).unflatten(2, (group, tokens))
        mask = torch.zeros(visible.shape, dtype=scores.dtype).masked_fill_(~visible, _MASKED)
        weights = torch.softmax(scores + mask[:, None, None], dim=-1)
        return torch.matmul(weights.flatten(2, 3), value).view(rows, heads, tokens, head_dim)


class _Rotate(torch.autograd.Function):
    """Rotation by phases; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, phases: Tensor) -> Tensor:
        ctx.save_for_backward(phases)
        return _turn(states, phases)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (phases,) = ctx.saved_tensors
        return _turn(gradients[0], phases.conj()), None


def _turn(states: Tensor, phases: Tensor) -> Tensor:
    turned = to_pairs(states) * phases
    return torch.cat([turned.real, turned.imag], dim=-1).to(states.dtype)


def _rotate(states: Tensor, phases: Tensor) -> Tensor:
    """``states`` [..., head_dim] in the model's order, rotated by ``phases`` [..., head_dim / 2] (complex)."""
    rotated: Tensor = _Rotate.apply(states, phases)  # type: ignore[no-untyped-call]
    return rotated


class UntouchedRotary(nn.Module):
    """Rotates nothing, and leaves queries and keys in the type that autocast gave them."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        device = hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
        one = torch.ones(1, 1, 1, dtype=dtype, device=device)
        return one, torch.zeros_like(one)


def composed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    composition: BlockPass | FinalPass,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [B, heads, T, d], key and value [B, kv_heads, T, d] to [B, T, heads, d]."""
    attended = composition.attend(int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(COMPOSED_ATTENTION, composed_attention)
