"""Rankings of pieces for a question: where hard distractors come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from blockrag.evaluation.pieces import Piece
from blockrag.retriever.embedding import Embedder, find_embedding
from blockrag.retriever.sparse import Bm25

Rank = Callable[[str], list[int]]
"""A question to the numbers of all pieces with a score above 0, best first."""


def bm25_ranking(pieces: Sequence[Piece]) -> Rank:
    """BM25 with the retriever's own weights; the IDF, which its engines add, is computed over ``pieces``."""
    model = Bm25()
    postings: dict[int, list[tuple[int, float]]] = {}
    for number, piece in enumerate(pieces):
        vector = model.embed_passage(piece.title, piece.text)
        for term, weight in zip(vector.indices, vector.values, strict=True):
            postings.setdefault(term, []).append((number, weight))

    def rank(question: str) -> list[int]:
        query = model.embed_query(question)
        scores = np.zeros(len(pieces))
        for term, weight in zip(query.indices, query.values, strict=True):
            found = postings.get(term, [])
            idf = math.log1p((len(pieces) - len(found) + 0.5) / (len(found) + 0.5))
            for number, value in found:
                scores[number] += idf * weight * value
        return _above_zero(scores)

    return rank


def dense_ranking(pieces: Sequence[Piece], embedding_model: str = "") -> Rank:
    """By cosine of the retriever's embeddings; ``embedding_model`` as in the settings, empty: the packaged one."""
    embedder = Embedder(find_embedding(embedding_model))
    vectors = embedder.embed_passages([f"{piece.title}\n{piece.text}" for piece in pieces])

    def rank(question: str) -> list[int]:
        scores: NDArray[np.float64] = (vectors @ embedder.embed_query(question)).astype(np.float64)
        return _above_zero(scores)

    return rank


def _above_zero(scores: NDArray[np.float64]) -> list[int]:
    order = np.argsort(-scores, kind="stable")
    return [int(number) for number in order if scores[number] > 0]
