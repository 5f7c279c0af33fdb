"""Attention within a window, and with bounded scores: plain products under a mask, a tile of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 128
"""Queries of a tile: with a window, a tile's keys are its window and the tile."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    total: int,
    scaling: float,
    out: Tensor,
    *,
    window: int | None,
    softcap: float | None,
) -> None:
    """What ``Attend`` says, for tokens that see ``window`` slots back, themselves included (None: all).

    Scores are ``softcap * tanh(score / softcap)`` where ``softcap`` is given. Computed in float32.
    """
    new, heads, _ = query.shape
    kv_heads = keys.shape[0]
    for start in range(0, new, _TILE):
        end = min(new, start + _TILE)
        first, last = total - new + start, total - new + end
        least = 0 if window is None else max(0, first - window + 1)
        rows = query[start:end].float().view(end - start, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)
        scores = torch.matmul(rows, keys[:, None, least:last].float().transpose(2, 3)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        of_query = torch.arange(first, last, device=query.device)[:, None]
        of_key = torch.arange(least, last, device=query.device)
        seen = of_key <= of_query
        if window is not None:
            seen &= of_key > of_query - window
        weights = torch.softmax(scores.masked_fill_(~seen, float("-inf")), dim=-1)
        attended = torch.matmul(weights, values[:, None, least:last].float())
        out[start:end].copy_(attended.permute(2, 0, 1, 3).flatten(1, 2))
