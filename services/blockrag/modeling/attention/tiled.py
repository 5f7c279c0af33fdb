"""Attention on a CPU through oneDNN, a tile of queries at a time; only the last columns of a tile need a mask."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from blockrag.modeling.linear_layers import linear, onednn_available

_TILE_SCORES = 1_000_000
"""Scores computed at a time on a CPU, per KV head: 4 MB, which the cores' shared cache holds beside K and V."""
_BATCHED_SCORES = 4_000_000
"""The same for all heads together in bfloat16: 8 MB."""
_SPARE = 1 / 8
"""Unused slots, as a share of those used, that are computed in vain rather than left out by a copy of the others."""
LEAST_SUM = 2.0**-90
"""Sums of exponentials between this and its inverse: without the row's maximum subtracted, nothing was out of range."""
LOG2_E = 1.4426950408889634
_TILED_FROM = 32_768
"""Scores per KV head from which tiles beat one fused call; below, the fixed cost of a call counts more."""


def attend(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> bool:
    """An ``Attend`` for prefills on a CPU."""
    new, heads, _ = query.shape
    if not onednn_available(query.device) or (keys.dtype != torch.bfloat16 and query.dtype != torch.float32):
        return False
    if new == 1 or new * (heads // keys.shape[0]) * total < _TILED_FROM:
        return False
    products = _all_heads if keys.dtype == torch.bfloat16 else _head_by_head
    scaled = query * (scaling * LOG2_E)  # powers of two are computed three times faster than those of e
    for shift in (False, True):
        sums = products(scaled, keys, values, total, shift, out)
        least, most = torch.aminmax(sums)
        # Seen from the sums, no exponential has overflowed and none that counts was lost.
        if float(least) > LEAST_SUM and float(most) < 1 / LEAST_SUM:
            break
    out.div_(sums)
    return True


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
