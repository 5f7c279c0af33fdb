"""Attention over slot lists: the contract and its reference implementation.

The contract, for every implementation: queries, keys and values of one ragged batch arrive **before** rotation; each
segment's token i stands at position ``segment.first_position + i``; the segment's keys and values go to the end of
its slot list (or, when a block is encoded, to the capture); each token attends to all earlier slots of its own list
and to its own segment up to itself; scores use the rotated queries and keys. Nothing crosses segments.

The reference implementation gathers nothing: keys were rotated when they were placed, so a step rotates only its own
tokens. It runs on any device torch has SDPA for. A paged implementation (rotating while it reads) fits beside it: it
gets the same arguments and registers under a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from blockrag.modeling.rotary import pairs_as_real, to_pairs
from blockrag.modeling.slots import SequenceState

ATTENTION_NAME = "blockrag_slots"
"""Name in transformers' ``AttentionInterface``. No mask function has it, so transformers builds no mask."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a ragged batch that belong to one slot list."""

    start: int
    length: int
    state: SequenceState | None
    """The slot list that they extend; None: a block of its own, at positions 0 …"""

    @property
    def first_position(self) -> int:
        return 0 if self.state is None else self.state.num_slots


@dataclass(frozen=True)
class Capture:
    """Where an encode pass leaves K before rotation (pair order) and V; [layers, kv_heads, tokens, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class RaggedBatch:
    """What one forward pass attends with. Given to ``forward`` of the model, read by the attention function."""

    segments: tuple[Segment, ...]
    phases: Tensor
    """Rotation of every token of the batch, complex64 [tokens, head_dim / 2]."""
    capture: Capture | None = None


def slot_attention(
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
    """What transformers calls: query [1, heads, T, d], key and value [1, kv_heads, T, d] to [1, T, heads, d]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    query, key, value = query[0], key[0], value[0]
    rotated_query = pairs_as_real(to_pairs(query) * slot_batch.phases).to(query.dtype)
    unrotated = to_pairs(key)
    rotated_key = pairs_as_real(unrotated * slot_batch.phases).to(key.dtype)
    if slot_batch.capture is not None:
        slot_batch.capture.keys[layer].copy_(pairs_as_real(unrotated))
        slot_batch.capture.values[layer].copy_(value)
    out = torch.empty((query.shape[1], query.shape[0], query.shape[2]), dtype=query.dtype, device=query.device)
    for segment in slot_batch.segments:
        span = slice(segment.start, segment.start + segment.length)
        own_query, keys, values = rotated_query[:, span], rotated_key[:, span], value[:, span]
        if segment.state is not None:
            keys, values = _append(segment.state, layer, keys, values)
        out[span] = attend(own_query, keys, values, scaling).transpose(0, 1)
    return out.unsqueeze(0), None


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of the last n of m slots to all before and to themselves.

    query [heads, n, d], keys and values [kv_heads, m, d], all rotated; returns [heads, n, d].
    """
    new, total = query.shape[1], keys.shape[1]
    mask = None
    if new > 1 and total > new:
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril_(total - new)
    return F.scaled_dot_product_attention(
        query.unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=new > 1 and mask is None,
        scale=scaling,
        enable_gqa=query.shape[0] != keys.shape[0],
    )[0]


def _append(state: SequenceState, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    all_keys, all_values = state.layer(layer)
    start, end = state.num_slots, state.num_slots + keys.shape[1]
    all_keys[:, start:end] = keys
    all_values[:, start:end] = values
    return all_keys[:, :end], all_values[:, :end]


AttentionInterface.register(ATTENTION_NAME, slot_attention)
