"""Chunks: a block cut into pieces of k tokens, the last of which may be shorter.

Source: REFRAG (arXiv 2509.01092, section 2). Imports nothing of ours, so that planning needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence


def chunk_bounds(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Start and end of each chunk of a block of ``tokens``, in order; together they cover it.

    Raises ValueError for a block without tokens and for ``chunk_tokens`` below 1.
    """
    _check(tokens, chunk_tokens)
    return [(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def chunk_count(tokens: int, chunk_tokens: int) -> int:
    """Chunks of a block of ``tokens``. Raises ValueError as ``chunk_bounds``."""
    _check(tokens, chunk_tokens)
    return -(-tokens // chunk_tokens)


def composed_slots(tokens: int, expanded: Sequence[bool], chunk_tokens: int) -> int:
    """Slots of a block of ``tokens`` with these chunks expanded and the others compressed to one slot each.

    Raises ValueError when ``expanded`` has not one entry per chunk.
    """
    bounds = chunk_bounds(tokens, chunk_tokens)
    if len(expanded) != len(bounds):
        raise ValueError(f"{len(expanded)} decisions for {len(bounds)} chunks")
    return sum(end - start if keep else 1 for (start, end), keep in zip(bounds, expanded, strict=True))


def effective_rate(tokens: int, slots: int) -> float:
    """How many tokens a slot stands for: 1 without compression, k when every chunk is compressed and whole."""
    if slots < 1 or tokens < slots:
        raise ValueError(f"{slots} slots for {tokens} tokens")
    return tokens / slots


def _check(tokens: int, chunk_tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"{tokens} tokens: a block has at least one")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens}: must be at least 1")
