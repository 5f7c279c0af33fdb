"""Chunks: a block cut into pieces of k tokens, the last of which may be shorter.

Source: REFRAG (arXiv 2509.01092, section 2). Imports nothing, so that planning needs no torch.
"""

from __future__ import annotations


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
