"""Attention over slot lists: the contract and its reference implementation.

The contract, for every implementation: queries, keys and values of one ragged batch arrive **before** rotation; each
segment's token i stands at position ``segment.first_position + i``; the segment's keys and values go to the end of
its slot list (or, when a block is encoded, to the capture); each token attends to all earlier slots of its own list
and to its own segment up to itself; scores use the rotated queries and keys. Nothing crosses segments. In the last
layer only each segment's last token is read, so an implementation may leave the others' outputs undefined but finite.

The reference implementation gathers nothing: keys were rotated when they were placed, so a step rotates only its own
tokens. It runs on any device torch has SDPA for. On a CPU, slots of bfloat16 go to a compiled kernel where there is one
(``blockrag.modeling.native``), the others to oneDNN's products. A paged implementation (rotating while it reads) fits
beside it: it gets the same arguments and registers under a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from blockrag.modeling.matmul import linear, onednn_available
from blockrag.modeling.native.kernels import Kernels, kernels
from blockrag.modeling.rotary import pairs_as_real, to_pairs
from blockrag.modeling.slots import SequenceState

ATTENTION_NAME = "blockrag_slots"
"""Name in transformers' ``AttentionInterface``. No mask function has it, so transformers builds no mask."""

_TILE_SCORES = 1_000_000
"""Scores computed at a time on a CPU, per KV head: 4 MB, which the cores' shared cache holds beside K and V."""
_BATCHED_SCORES = 4_000_000
"""The same for all heads together in bfloat16: 8 MB."""
_SPARE = 1 / 8
"""Unused slots, as a share of those used, that are computed in vain rather than left out by a copy of the others."""
_LEAST_SUM = 2.0**-90
"""Sums of exponentials between this and its inverse: without the row's maximum subtracted, nothing was out of range."""
_LOG2_E = 1.4426950408889634
_TILED_FROM = 32_768
"""Scores per KV head from which tiles beat one fused call; below, the fixed cost of a call counts more."""


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
    """Rotation of every token of the batch, complex64 [tokens, 1, head_dim / 2]."""
    last_layer: int
    """Number of the layer after which only each segment's last token is read."""
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
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    unrotated = to_pairs(key)
    if slot_batch.capture is not None:
        slot_batch.capture.keys[layer].copy_(pairs_as_real(unrotated).transpose(0, 1))
        slot_batch.capture.values[layer].copy_(value.transpose(0, 1))
        if layer == slot_batch.last_layer:
            return torch.zeros_like(query).unsqueeze(0), None
    rotated_query = pairs_as_real(to_pairs(query) * slot_batch.phases).to(query.dtype)
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
    return out.unsqueeze(0), None


def attend(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> None:
    """Attention of the last n of ``total`` slots to all before and to themselves.

    query and out [n, heads, d], keys and values [kv_heads, ≥ total, d], all rotated; what stands beyond ``total`` is
    finite.
    """
    if _attend_compiled(query, keys, values, total, scaling, out):
        return
    new, heads, _ = query.shape
    kv_heads = keys.shape[0]
    onednn = onednn_available(query.device) and (keys.dtype == torch.bfloat16 or query.dtype == torch.float32)
    if onednn and new > 1 and new * (heads // kv_heads) * total >= _TILED_FROM:
        _attend_tiled(query, keys, values, total, scaling, out)
        return
    query, keys, values = query.to(keys.dtype), keys[:, :total], values[:, :total]
    if new == 1:
        # nothing to mask; a group's heads stand in for query positions, so that K and V are read once
        grouped = query.view(1, kv_heads, heads // kv_heads, -1)
        attended = F.scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0), scale=scaling)
        out.view_as(grouped).copy_(attended)
        return
    mask = None
    if total > new:
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril_(total - new)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    out.copy_(attended[0].transpose(0, 1))


def _attend_compiled(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> bool:
    """The same by the compiled kernel; False where there is none for these, or where its result would not be exact."""
    if not (Kernels.take(keys) and Kernels.take(values) and keys.stride(0) == values.stride(0)):
        return False
    if not (query.dtype == out.dtype == torch.float32 and query.is_contiguous() and out.is_contiguous()):
        return False
    compiled = kernels()
    if compiled is None:
        return False
    return compiled.attend(query, keys, values, total, scaling * _LOG2_E, 1 / _LEAST_SUM, out)


def _attend_tiled(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> None:
    """The same on a CPU through oneDNN, a tile of queries at a time; only the last columns of a tile need a mask."""
    products = _all_heads if keys.dtype == torch.bfloat16 else _head_by_head
    scaled = query * (scaling * _LOG2_E)  # powers of two are computed three times faster than those of e
    for shift in (False, True):
        sums = products(scaled, keys, values, total, shift, out)
        least, most = torch.aminmax(sums)
        # Seen from the sums, no exponential has overflowed and none that counts was lost.
        if float(least) > _LEAST_SUM and float(most) < 1 / _LEAST_SUM:
            break
    out.div_(sums)


def _head_by_head(query: Tensor, keys: Tensor, values: Tensor, total: int, shift: bool, out: Tensor) -> Tensor:
    """Attention in float32, not yet divided by the sums of its weights, into ``out``; the sums, [n, heads, 1]."""
    new, heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    tile = max(min(new, 8), -(-new // -(-new * group * total // _TILE_SCORES)))
    sums = query.new_empty(new, heads, 1)
    for head in range(kv_heads):
        span = slice(head * group, (head + 1) * group)
        # Fresh keys are views over [tokens, kv_heads, d], for which oneDNN has only its slow reference kernel; a
        # sequence's own slots are packed by head already and not copied.
        head_keys, head_values = keys[head, :total].contiguous(), values[head, :total].contiguous()
        for start in range(0, new, tile):
            end = min(new, start + tile)
            rows, seen = end - start, total - new + end
            scores = linear(query[start:end, span].reshape(rows * group, head_dim), head_keys[:seen])
            scores.view(rows, group, seen)[:, :, seen - rows :].add_(_causal(rows, 0, scores.dtype))
            sums[start:end, span] = _exponentials(scores, shift).view(rows, group, 1)
            out[start:end, span] = linear(scores, head_values[:seen].t()).view(rows, group, head_dim)
    return sums


def _all_heads(query: Tensor, keys: Tensor, values: Tensor, total: int, shift: bool, out: Tensor) -> Tensor:
    """The same for slots of bfloat16, all KV heads in one product: oneDNN gives each core whole heads."""
    new, heads, head_dim = query.shape
    kv_heads, width, _ = keys.shape
    group = heads // kv_heads
    tile = max(1, min(new, _BATCHED_SCORES // (heads * total)))
    grouped = query.to(keys.dtype).view(new, kv_heads, group, head_dim).transpose(0, 1)
    sums = query.new_empty(new, heads, 1)
    for start in range(0, new, tile):
        end = min(new, start + tile)
        rows, seen = end - start, total - new + end
        # oneDNN copies what is not contiguous: a few slots too many, masked away, cost less.
        taken = width if width - seen <= _SPARE * seen else seen
        tile_query = grouped[:, start:end].reshape(kv_heads, rows * group, head_dim)
        scores = torch.bmm(tile_query, keys[:, :taken].transpose(1, 2))
        own = scores.view(kv_heads, rows, group, taken)[..., seen - rows :]
        own.add_(_causal(rows, taken - seen, scores.dtype))
        by_head = (rows, kv_heads, group, -1)
        tile_sums = _exponentials(scores, shift)
        attended = torch.bmm(scores, values[:, :taken])
        for place, found in ((sums, tile_sums), (out, attended)):
            place[start:end].view(by_head).copy_(found.view(kv_heads, rows, group, -1).transpose(0, 1))
    return sums


def _exponentials(scores: Tensor, shift: bool) -> Tensor:
    """Turn scores into powers of two, in place; their sums over the last dimension, [..., 1].

    In place, because a second buffer of this size is fresh memory, faulted in page by page, each time. ``shift``
    subtracts each row's greatest score first, which keeps everything in range and takes as long again.
    """
    if shift:
        scores.sub_(scores.amax(-1, keepdim=True))
    return torch.exp2(scores, out=scores).sum(-1, keepdim=True)


@lru_cache(maxsize=32)
def _causal(size: int, spare: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of ``size`` tokens' own slots and of ``spare`` after; [size, 1, size + spare]."""
    above = torch.ones(size, size + spare, dtype=torch.bool).triu_(1)
    return torch.zeros(size, size + spare, dtype=dtype).masked_fill_(above, float("-inf")).unsqueeze(1)


def _append(state: SequenceState, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    all_keys, all_values = state.layer(layer)
    start, end = state.num_slots, state.num_slots + keys.shape[1]
    all_keys[:, start:end] = keys
    all_values[:, start:end] = values
    return all_keys, all_values


AttentionInterface.register(ATTENTION_NAME, slot_attention)
