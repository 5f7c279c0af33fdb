"""What a passage's point holds beside its vectors, the same in both engines."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from blockrag.retriever.conditions import metadata_numbers, metadata_terms
from blockrag.retriever.vector_index import Document, Passage

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
PASSAGE_ID = "passage_id"
TITLE = "title"
COMMIT = "commit"
"""Mark of the commit that showed a passage; in a catalogue entry, of the one that is shown."""
SINCE = "since"
"""Since when a passage waits to be shown, or to be removed, in seconds since 1970; absent when it is settled."""
DIGEST = "digest"
"""Equal for equal texts."""
TERMS = "terms"
NUMBERS = "numbers"

KEYWORD_FIELDS = (STATE, DOCUMENT_ID, VERSION, COMMIT, DIGEST, TERMS)
"""Fields that searches and commits select by; the engines index them."""


def passage_payload(passage: Passage, staged_at: float) -> dict[str, Any]:
    """The payload of a staged passage. ``staged_at``: seconds since 1970."""
    return {
        STATE: STAGED,
        SINCE: staged_at,
        PASSAGE_ID: passage.passage_id,
        DOCUMENT_ID: passage.document_id,
        VERSION: passage.version,
        ORDINAL: passage.ordinal,
        TITLE: passage.title,
        "text": passage.text,
        "metadata": passage.metadata,
        DIGEST: text_digest(passage.text),
        TERMS: metadata_terms(passage.metadata),
        NUMBERS: metadata_numbers(passage.metadata),
    }


def text_digest(text: str) -> str:
    """Equal for texts that differ in white space at most."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).hexdigest()


def passage_of(payload: Mapping[str, Any]) -> Passage:
    """The passage that a point holds."""
    return Passage(
        passage_id=payload[PASSAGE_ID],
        document_id=payload[DOCUMENT_ID],
        version=payload[VERSION],
        ordinal=int(payload[ORDINAL]),
        title=payload[TITLE],
        text=payload["text"],
        metadata=dict(payload.get("metadata") or {}),
    )


def new_commit() -> str:
    """A mark that no other commit has."""
    return uuid.uuid4().hex


def new_point() -> str:
    """The id of a point that holds a staged passage."""
    return str(uuid.uuid4())


def one_for_each_place(points: Iterable[tuple[str, Mapping[str, Any]]], places: int) -> list[str]:
    """Of staged points, ids with their payloads, one for each ordinal below ``places``: the same for every caller."""
    chosen: dict[int, str] = {}
    for point_id, payload in points:
        ordinal = int(payload[ORDINAL])
        if ordinal < places:
            chosen[ordinal] = min(point_id, chosen.get(ordinal, point_id))
    return [chosen[ordinal] for ordinal in sorted(chosen)]


def document_payload(document: Document) -> dict[str, Any]:
    """The payload of a catalogue entry."""
    return {
        STATE: DOCUMENT,
        DOCUMENT_ID: document.document_id,
        VERSION: document.version,
        TITLE: document.title,
        "passages": document.passages,
        "metadata": document.metadata,
        "source": document.source,
        COMMIT: document.commit,
    }


def document_of(payload: Mapping[str, Any]) -> Document:
    """The document that a catalogue entry describes."""
    return Document(
        document_id=payload[DOCUMENT_ID],
        version=payload[VERSION],
        title=payload[TITLE],
        passages=int(payload["passages"]),
        metadata=dict(payload.get("metadata") or {}),
        source=payload["source"],
        commit=payload[COMMIT],
    )
