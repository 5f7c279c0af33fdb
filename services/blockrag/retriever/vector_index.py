"""What an index of passages does, whichever engine holds it.

Staging and visibility: passages are staged one batch after another and cannot be found. Every staged passage is a
point of its own, also where the same version is staged twice. A commit takes one staged point for each place, marks
them with a name that no other commit has, and writes that name into the catalogue's entry of the document. This is the
step that readers see: passages whose mark the entry names are returned, and no others, so readers see all of the old
version or all of the new one. What a commit replaced is removed by its mark, which never becomes current again, so no
caller removes what another just showed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blockrag.bm25 import SparseVector
from blockrag.identity import CollectionId
from blockrag.languages import DEFAULT_LANGUAGE
from blockrag.results import PassageHolder

if TYPE_CHECKING:
    from blockrag.retriever.payload import Condition


STAGED_FOR_S = 24 * 3600
"""Passages that were staged longer ago and never committed are swept away."""
COMMITS_WITHIN_S = 3600
"""No commit or removal takes longer; what one left behind that died is removed after this time."""
MOST_HOLDERS = 1000
MOST_CANDIDATES = 10_000
"""Passages taken from each search when so many texts are equal that fewer leave too little."""


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
    source: str = ""
    """What it came from: a file, or what the user named. Documents can be removed by it."""
    commit: str = field(default="", compare=False)
    """Mark of its passages; the index sets it."""


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
    """A search result. Passages with equal texts are one result."""

    passage: Passage
    score: float
    """Fused score; comparable within one search only."""
    also_in: tuple[PassageHolder, ...] = ()
    """The other documents that hold this text and fit the conditions, by id; at most ``MOST_HOLDERS`` in a search."""


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
    async def stage(
        self, collection: CollectionId, passages: Sequence[EmbeddedPassage], language: str = DEFAULT_LANGUAGE
    ) -> None:
        """Stores passages of one document version invisibly; makes the collection, with this language.

        Raises ``InvalidRequestError`` when the collection has another language.
        """

    @abstractmethod
    async def language(self, collection: CollectionId) -> str:
        """The language of a collection's BM25 terms. Raises ``NotFoundError``."""

    @abstractmethod
    async def commit(self, collection: CollectionId, document: Document) -> str:
        """Makes the staged version visible and removes the older one, which it returns; empty: there was none. Nothing
        when it is visible already.

        Raises ``InvalidRequestError`` when fewer than ``document.passages`` are staged; nothing changes then. A
        removal of the document that runs at the same time may be the reason.
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
    async def disk_bytes(self, collection: CollectionId) -> int:
        """What a collection takes of the engine's disk, staged and removed passages with it as long as they do.

        Where the engine does not tell, an estimate by the number of its points. Raises ``NotFoundError``.
        """

    @abstractmethod
    async def collections(self, tenant: str | None) -> list[CollectionId]:
        """A tenant's collections, or all of them, sorted."""

    @abstractmethod
    async def sweep(self, older_than_s: float = STAGED_FOR_S) -> None:
        """Removes passages that were staged longer ago and not committed, and what interrupted commits left."""

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


def other_language(collection: CollectionId, stored: str, wanted: str) -> str:
    """What is wrong with passages of another language than their collection's."""
    return (
        f"collection {collection.name!r} has the language {stored}, not {wanted};"
        " leave the language out, or ingest into another collection"
    )
