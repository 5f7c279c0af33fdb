"""Small passages with readable vectors, for tests of the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blockrag.bm25 import SparseVector
from blockrag.identity import CollectionId, passage_id
from blockrag.retriever.payload import Condition
from blockrag.retriever.vector_index import Document, EmbeddedPassage, EmbeddingInfo, Passage, SearchQuery

DIMENSIONS = 8
EMBEDDING = EmbeddingInfo("test-model", DIMENSIONS)
HOME = CollectionId("public", "default")


def embedded(
    document_id: str,
    version: str,
    ordinal: int,
    *,
    text: str = "",
    near: int = 0,
    terms: Sequence[int] = (1,),
    metadata: Mapping[str, Any] | None = None,
    collection: CollectionId = HOME,
) -> EmbeddedPassage:
    """A passage whose dense vector points along axis ``near``, tilted a little by its place."""
    dense = np.zeros(DIMENSIONS, dtype=np.float32)
    dense[near] = 1.0
    dense[(near + 1) % DIMENSIONS] = 0.01 * (ordinal + 1)
    return EmbeddedPassage(
        Passage(
            passage_id=passage_id(collection, document_id, version, ordinal),
            document_id=document_id,
            version=version,
            ordinal=ordinal,
            title=f"Title of {document_id}",
            text=text or f"{document_id} {version} passage {ordinal}",
            metadata=dict(metadata or {}),
        ),
        dense / np.linalg.norm(dense),
        SparseVector(tuple(sorted(terms)), (1.0,) * len(terms)),
    )


def document(
    document_id: str, version: str, passages: int, metadata: Mapping[str, Any] | None = None, title: str = ""
) -> Document:
    return Document(document_id, version, title or f"Title of {document_id}", passages, dict(metadata or {}))


def query(
    *conditions: Condition, near: int = 0, terms: Sequence[int] = (1,), limit: int = 10, candidates: int = 50
) -> SearchQuery:
    dense = np.zeros(DIMENSIONS, dtype=np.float32)
    dense[near] = 1.0
    sparse = SparseVector(tuple(terms), (1.0,) * len(terms))
    return SearchQuery(dense, sparse, limit, candidates, rrf_k=60, conditions=tuple(conditions))
