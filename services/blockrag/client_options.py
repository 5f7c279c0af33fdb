"""What a question may be asked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from blockrag.results import AttentionModeName, Compression, Condition, GivenPassage

Filter = Mapping[str, str | float | bool] | Sequence[Condition]
"""Conditions, or fields and the values that they must have."""


class GenerateOptions(TypedDict, total=False):
    """Options of a question; what is left out is the server's default."""

    collection: str
    top_k: int
    filter: Filter
    attention_mode: AttentionModeName
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]
    timeout_s: float
    max_context_tokens: int
    passages: Sequence[GivenPassage]
    compression: Compression
