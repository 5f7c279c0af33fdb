"""Passages as serving cuts them: every text in pieces whose block has at most the bundle's ``passage_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockrag.evaluation.metrics import contains, normalize
from blockrag.evaluation.question_data import SourcePassage, SourceQuestion
from blockrag.ingest.splitting import PassageSplitter
from blockrag.modeling.template import BundleTokenizer, PromptTemplate


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
