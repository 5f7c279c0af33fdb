"""Attention over slot lists that were rotated when they were placed: each segment by the first that is for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blockrag.modeling.attention import compiled, reference, tiled
from blockrag.modeling.attention.base import Attend, RaggedBatch
from blockrag.modeling.rotary import pairs_as_real, to_pairs
from blockrag.modeling.slots import SequenceState

IMPLEMENTATIONS: tuple[Attend, ...] = (compiled.attend, tiled.attend, reference.attend)
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
    **_: Any,
) -> tuple[Tensor, None]:
    """The ``SlotAttention`` over lists of slots that lie in memory as they are attended to."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    unrotated = to_pairs(key)
    if slot_batch.capture is not None:
        slot_batch.capture.keys[layer].copy_(pairs_as_real(unrotated).transpose(0, 1))
        slot_batch.capture.values[layer].copy_(value.transpose(0, 1))
        if layer == slot_batch.last_layer:
            return torch.zeros_like(query).unsqueeze(0), None
    rotated_query = pairs_as_real(to_pairs(query) * slot_batch.phases)
    if not query.is_cpu:  # the compiled kernel reads queries of float32, and rounds them itself
        rotated_query = rotated_query.to(query.dtype)
    rotated_key = pairs_as_real(unrotated * slot_batch.phases).to(key.dtype)
    only_last = layer == slot_batch.last_layer
    out = torch.zeros_like(rotated_query) if only_last else torch.empty_like(rotated_query)
    for segment in slot_batch.segments:
        end = segment.start + segment.length
        keys = rotated_key[segment.start : end].transpose(0, 1)
        values = value[segment.start : end].transpose(0, 1)
        total = segment.first_position + segment.length
        if segment.state is not None:
            keys, values = _append(segment.state, layer, keys, values)
        first = end - 1 if only_last else segment.start
        attend(rotated_query[first:end], keys, values, total, scaling, out[first:end])
    return out.to(query.dtype).unsqueeze(0), None


def attend(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> None:
    """What ``Attend`` says, by the first implementation that does it."""
    for implementation in IMPLEMENTATIONS:
        if implementation(query, keys, values, total, scaling, out):
            return


def _append(state: SequenceState, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    all_keys, all_values = state.layer(layer)
    start, end = state.num_slots, state.num_slots + keys.shape[1]
    all_keys[:, start:end] = keys
    all_values[:, start:end] = values
    return all_keys, all_values
