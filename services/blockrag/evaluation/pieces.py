"""Passages as serving cuts them: every text in pieces whose block has at most the bundle's ``passage_tokens``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.bm25 import Bm25Scorer
from blockrag.evaluation.question_data import SourcePassage, SourceQuestion
from blockrag.evaluation.scoring import contains, normalize
from blockrag.ingest.splitting import PassageSplitter
from blockrag.modeling.template import BundleTokenizer, PromptTemplate
from blockrag.retriever.embedding import Embedder, find_embedding


@dataclass(frozen=True)
class Piece:
    """One passage of a prompt."""

    title: str
    text: str


class PieceMaker:
    """Splits passages with the splitter that ingestion uses, each once."""

    def __init__(self, template: PromptTemplate, tokenizer: BundleTokenizer, passage_tokens: int) -> None:
        self._splitter = PassageSplitter(template, tokenizer, passage_tokens)
        self._made: dict[SourcePassage, tuple[Piece, ...]] = {}

    def pieces(self, passage: SourcePassage) -> tuple[Piece, ...]:
        """The pieces of a passage, in order; none of an empty one."""
        if passage not in self._made:
            title = self._splitter.fit_title(passage.title)
            texts = self._splitter.split(title, [passage.text])
            self._made[passage] = tuple(Piece(title.text, text) for text in texts)
        return self._made[passage]


def nearest_piece(pieces: Sequence[Piece], question: str) -> Piece:
    """The piece that shares most words with the question; the first of equals."""
    words = set(normalize(question).split())
    return max(pieces, key=lambda piece: len(words & set(normalize(piece.text).split())))


def holding_pieces(pieces: Sequence[Piece], answers: Sequence[str]) -> list[Piece]:
    """The pieces that hold an answer as it stands or, where none does, after normalisation."""
    holding = [piece for piece in pieces if any(answer in piece.text for answer in answers)]
    return holding or [piece for piece in pieces if contains(piece.text, answers)]


def gold_piece(pieces: Sequence[Piece], question: SourceQuestion) -> tuple[Piece, bool]:
    """The piece to answer from, and whether it holds an answer.

    Of several that do, the one nearest to the question. Where none does (the answer is in other words than the
    text's), the one that shares most words with question and answers.
    """
    holding = holding_pieces(pieces, question.answers)
    if holding:
        return nearest_piece(holding, question.text), True
    return nearest_piece(pieces, " ".join((question.text, *question.answers))), False


Rank = Callable[[str], list[int]]
"""A question to the numbers of all pieces with a score above 0, best first."""


def bm25_ranking(pieces: Sequence[Piece]) -> Rank:
    """BM25 with the retriever's own weights; the IDF, which its engines add, is computed over ``pieces``."""
    scorer = Bm25Scorer([(piece.title, piece.text) for piece in pieces])
    return lambda question: _above_zero(scorer.scores(question))


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
