"""Attention over slot lists that were rotated when they were placed: each segment by the first that is for it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from blockrag.modeling.attention import compiled, masked, reference
from blockrag.modeling.attention.contract import Attend, RaggedBatch, SlotAttention
from blockrag.modeling.rotary import pairs_as_real
from blockrag.modeling.slots import SequenceState

IMPLEMENTATIONS: tuple[Attend, ...] = (compiled.attend, reference.attend)
"""Fastest first; the last takes everything."""


def attention_over_lists(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    slot_batch: RaggedBatch,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The ``SlotAttention`` over lists of slots that lie in memory as they are attended to."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    rotation, phases = slot_batch.rotations[layer], slot_batch.phases[layer]
    unrotated = rotation.to_pairs(key)
    if slot_batch.capture is not None:
        slot_batch.capture.keys[layer].copy_(pairs_as_real(unrotated).transpose(0, 1))
        slot_batch.capture.values[layer].copy_(value.transpose(0, 1))
        if layer == slot_batch.last_layer:
            return torch.zeros_like(query).unsqueeze(0), None
    rotated_query = pairs_as_real(rotation.to_pairs(query) * phases)
    if not query.is_cpu:  # the compiled kernel reads queries of float32, and rounds them itself
        rotated_query = rotated_query.to(query.dtype)
    rotated_key = pairs_as_real(unrotated * phases).to(key.dtype)
    only_last = layer == slot_batch.last_layer
    out = torch.zeros_like(rotated_query) if only_last else torch.empty_like(rotated_query)
    for segment in slot_batch.segments:
        end = segment.start + segment.length
        keys = rotated_key[segment.start : end].transpose(0, 1)
        values = value[segment.start : end].transpose(0, 1)
        total = segment.first_slot + segment.length
        if segment.state is not None:
            keys, values = _append(segment.state, layer, keys, values)
        first = end - 1 if only_last else segment.start
        attend(rotated_query[first:end], keys, values, total, scaling, out[first:end], sliding_window, softcap)
    return out.to(query.dtype).unsqueeze(0), None


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    total: int,
    scaling: float,
    out: Tensor,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """What ``Attend`` says, by the first implementation that does it; ``masked`` says what the last two are."""
    if window is not None and total > window and len(query) == 1:  # what it does not see is left out
        keys, values, total = keys[:, total - window : total], values[:, total - window : total], window
    if softcap is not None or (window is not None and total > window):
        masked.attend(query, keys, values, total, scaling, out, window=window, softcap=softcap)
        return
    for implementation in IMPLEMENTATIONS:
        if implementation(query, keys, values, total, scaling, out):
            return


def _append(state: SequenceState, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    all_keys, all_values = state.layer(layer)
    start, end = state.num_slots, state.num_slots + keys.shape[1]
    all_keys[:, start:end] = keys
    all_values[:, start:end] = values
    return all_keys, all_values


BATCH: ContextVar[RaggedBatch] = ContextVar("batch of the forward pass")
"""Not an argument of the forward pass: some models hand none on to their attention."""


def register(attention: SlotAttention) -> str:
    """The name under which transformers knows it. No mask function has it, so transformers builds no mask."""
    name = f"blockrag_{getattr(attention, '__name__', type(attention).__name__)}"

    def of_the_batch(*states: Any, **options: Any) -> tuple[Tensor, None]:
        return attention(*states, **options, slot_batch=BATCH.get())

    AttentionInterface.register(name, of_the_batch)
    return name
