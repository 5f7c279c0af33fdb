"""BM25 weights of passages and queries, made by Qdrant's own model for both engines (the engines add the IDF)."""

from __future__ import annotations

import qdrant_edge as qdrant

from blockrag.retriever.base import SparseVector

_MEAN_TERMS = 48.0
"""Mean terms of a passage without stop words; BM25's length normalisation. Measured for passages of 128 tokens."""


class Bm25:
    """English stemming and stop words; accents are folded. Safe to share between threads."""

    def __init__(self) -> None:
        self._model = qdrant.Bm25(qdrant.Bm25Config(avg_len=_MEAN_TERMS, language="english", ascii_folding=True))

    def embed_passage(self, title: str, text: str) -> SparseVector:
        """Weights of a passage; its title counts as text."""
        return _vector(self._model.embed_document(f"{title}\n{text}"))

    def embed_query(self, text: str) -> SparseVector:
        """Weights of a query; empty when it has only stop words."""
        return _vector(self._model.embed_query(text))


def _vector(vector: qdrant.SparseVector) -> SparseVector:
    return SparseVector(tuple(vector.indices), tuple(vector.values))
