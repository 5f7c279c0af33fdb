"""What a passage's point holds beside its vectors, the same in both engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockrag.retriever.base import Document, Passage
from blockrag.retriever.filters import metadata_numbers, metadata_terms

DENSE = "dense"
BM25 = "bm25"

STATE = "state"
STAGED = "staged"
VISIBLE = "visible"
DOCUMENT = "document"
"""State of the points that are no passages but the catalogue's entries (server only)."""
MODEL = "model"
"""State of the one point that names the embedding model (server only)."""

DOCUMENT_ID = "document_id"
VERSION = "version"
ORDINAL = "ordinal"
STAGED_AT = "staged_at"
TERMS = "terms"
NUMBERS = "numbers"

KEYWORD_FIELDS = (STATE, DOCUMENT_ID, VERSION, TERMS)
"""Fields that searches and commits select by; the engines index them."""


def passage_payload(passage: Passage, staged_at: float) -> dict[str, Any]:
    """The payload of a staged passage. ``staged_at``: seconds since 1970."""
    return {
        STATE: STAGED,
        STAGED_AT: staged_at,
        DOCUMENT_ID: passage.document_id,
        VERSION: passage.version,
        ORDINAL: passage.ordinal,
        "title": passage.title,
        "text": passage.text,
        "metadata": passage.metadata,
        TERMS: metadata_terms(passage.metadata),
        NUMBERS: metadata_numbers(passage.metadata),
    }


def passage_of(point_id: object, payload: Mapping[str, Any]) -> Passage:
    """The passage that a point holds."""
    return Passage(
        passage_id=str(point_id),
        document_id=payload[DOCUMENT_ID],
        version=payload[VERSION],
        ordinal=int(payload[ORDINAL]),
        title=payload["title"],
        text=payload["text"],
        metadata=dict(payload.get("metadata") or {}),
    )


def document_payload(document: Document) -> dict[str, Any]:
    """The payload of a catalogue entry."""
    return {
        STATE: DOCUMENT,
        DOCUMENT_ID: document.document_id,
        VERSION: document.version,
        "title": document.title,
        "passages": document.passages,
        "metadata": document.metadata,
    }


def document_of(payload: Mapping[str, Any]) -> Document:
    """The document that a catalogue entry describes."""
    return Document(
        document_id=payload[DOCUMENT_ID],
        version=payload[VERSION],
        title=payload["title"],
        passages=int(payload["passages"]),
        metadata=dict(payload.get("metadata") or {}),
    )
