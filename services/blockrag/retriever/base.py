"""What an index of passages does, whichever engine holds it.

Staging and visibility: passages are staged one batch after another and cannot be found. Committing their document
switches them visible and the document's older version away, in one step for every reader: the catalogue's entry of
the document decides which version is returned, so readers see all of the old version or all of the new one. A run
that was interrupted is repeated from its start; ids are made from the content's version, so nothing is stored twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockrag.retriever.filters import Condition
from blockrag.retriever.identity import CollectionId

STAGED_FOR_S = 24 * 3600
"""Passages that were staged longer ago and never committed are swept away."""


@dataclass(frozen=True)
class SparseVector:
    """BM25 weights of terms; ``indices`` are hashes of the terms."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Passage:
    """A piece of a document."""

    passage_id: str
    document_id: str
    version: str
    ordinal: int
    """Place within the document, from 0."""
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddedPassage:
    """A passage with its vectors."""

    passage: Passage
    dense: NDArray[np.float32]
    """Shape [dimensions]."""
    sparse: SparseVector


@dataclass(frozen=True)
class Document:
    """A visible document."""

    document_id: str
    version: str
    title: str
    passages: int
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Replaced:
    """What a commit replaced."""

    version: str
    """Empty: nothing."""
    passages: int


@dataclass(frozen=True)
class Counts:
    """Documents and passages that are visible."""

    documents: int
    passages: int


@dataclass(frozen=True)
class SearchQuery:
    """One search: the passages nearest by dense vector and by BM25, fused by reciprocal ranks."""

    dense: NDArray[np.float32] | None
    """Shape [dimensions]; None: only BM25 counts."""
    sparse: SparseVector
    """May be empty: only the dense search counts then."""
    limit: int
    candidates: int
    """Passages taken from each of the two searches."""
    rrf_k: int
    conditions: tuple[Condition, ...] = ()
    """All must hold."""


@dataclass(frozen=True)
class FoundPassage:
    """A search result."""

    passage: Passage
    score: float
    """Fused score; comparable within one search only."""


@dataclass(frozen=True)
class EmbeddingInfo:
    """Which vectors an index holds. An index made with another model is refused."""

    fingerprint: str
    dimensions: int


class VectorIndex(ABC):
    """Passages with vectors, and the catalogue of their documents.

    Every method raises ``UnavailableError`` when the engine cannot be reached, and ``SettingsError`` when the index
    was made with another embedding model. Methods may run concurrently.
    """

    @abstractmethod
    async def stage(self, collection: CollectionId, passages: Sequence[EmbeddedPassage]) -> None:
        """Stores passages of one document version invisibly; makes the collection. Nothing when it is visible."""

    @abstractmethod
    async def commit(self, collection: CollectionId, document: Document) -> Replaced:
        """Makes the staged version visible and removes the older one. Nothing when it is visible already.

        Raises ``InvalidRequestError`` when fewer than ``document.passages`` are staged; nothing changes then.
        """

    @abstractmethod
    async def remove_document(self, collection: CollectionId, document_id: str) -> int:
        """Removes a document with everything staged for it; returns its visible passages.

        Raises ``NotFoundError`` for an unknown collection or document.
        """

    @abstractmethod
    async def remove_collection(self, collection: CollectionId) -> Counts:
        """Removes a collection. Raises ``NotFoundError``."""

    @abstractmethod
    async def search(self, collection: CollectionId, query: SearchQuery) -> list[FoundPassage]:
        """Visible passages, best first, at most ``query.limit``. Raises ``NotFoundError`` for the collection."""

    @abstractmethod
    async def documents(self, collection: CollectionId, after: str, limit: int) -> list[Document]:
        """Visible documents whose id sorts after ``after``, by id. Raises ``NotFoundError`` for the collection."""

    @abstractmethod
    async def find_documents(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Document]:
        """Those of these documents that are visible, by id. Raises ``NotFoundError`` for the collection."""

    @abstractmethod
    async def passages(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Passage]:
        """Visible passages of these documents, by document id and place. Raises ``NotFoundError``."""

    @abstractmethod
    async def counts(self, collection: CollectionId) -> Counts:
        """What is visible in a collection. Raises ``NotFoundError``."""

    @abstractmethod
    async def collections(self, tenant: str | None) -> list[CollectionId]:
        """A tenant's collections, or all of them, sorted."""

    @abstractmethod
    async def sweep(self, older_than_s: float = STAGED_FOR_S) -> None:
        """Removes passages that were staged longer ago and not committed."""

    @abstractmethod
    async def close(self) -> None:
        """Makes everything durable and lets go of the engine."""


def too_few_staged(staged: int, document: Document) -> str:
    """The problem of a commit that comes too early."""
    return (
        f"only {staged} of {document.passages} passages of document {document.document_id!r} are staged;"
        " send the document again"
    )


def unknown_collection(collection: CollectionId) -> str:
    """What is wrong with a request for a collection that does not exist."""
    return f"collection {collection.name!r} does not exist"


def unknown_document(collection: CollectionId, document_id: str) -> str:
    """What is wrong with a request for a document that does not exist."""
    return f"document {document_id!r} does not exist in collection {collection.name!r}"
