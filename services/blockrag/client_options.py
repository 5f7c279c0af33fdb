"""What a question may be asked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from blockrag.results import AttentionModeName, Compression, Condition, GivenPassage

Scalar = str | float | bool
Filter = Mapping[str, Scalar | Sequence[Scalar]] | Sequence[Condition]
"""Conditions, or fields and the value that each must have; of several in a list, one."""


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
    stop: str | Sequence[str]
    timeout_s: float
    max_context_tokens: int
    passages: Sequence[GivenPassage]
    compression: Compression
    turns: Sequence[tuple[str, str]]
    """Earlier questions and their answers, oldest first."""
    instructions: str
    """What is asked of every answer."""


class IngestOptions(TypedDict, total=False):
    """Options of an ingest; what is left out is empty, or the server's default."""

    collection: str
    title: str
    media_type: str
    metadata: Mapping[str, Any]
    source: str
    """What the document comes from, for ``delete_source``; left out: the document's id."""
    language: str
    """Of a new collection, see ``blockrag.languages``; left out: the server's default."""
    dry_run: bool
    """Store nothing and say what would be stored."""
