"""What a training prompt is made of: blocks of tokens, and the questions that are asked behind them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Branch:
    """One question of a context with its answer: a last block."""

    prompt: list[int]
    """Ids up to the token after which the answer starts."""
    answer: list[int]
    """Ids of the answer and of the token that ends it: the target."""


@dataclass(frozen=True)
class Context:
    """Passages with one question or several."""

    blocks: list[list[int]]
    """The instruction block and one block per passage."""
    branches: list[Branch]
