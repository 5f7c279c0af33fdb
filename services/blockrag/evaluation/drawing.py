"""Passages as serving cuts them, and drawing what is asked: a question's gold piece, its distractors, and its place.

Every text is cut in pieces whose block has at most the bundle's ``passage_tokens``. Distractors are nested: a context
of five passages holds the first four of the twenty-passage one, so that numbers of passages and modes are compared on
the same questions and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from blockrag.bm25 import Bm25Scorer
from blockrag.errors import SetupError
from blockrag.evaluation.question_data import QuestionData, SourcePassage, SourceQuestion
from blockrag.evaluation.scoring import contains, normalize
from blockrag.ingest.splitting import PassageSplitter
from blockrag.modeling.template import BundleTokenizer, PromptTemplate
from blockrag.retriever.embedding import Embedder, find_embedding

if TYPE_CHECKING:
    from blockrag.evaluation.experiment_options import Distractors


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


@dataclass(frozen=True)
class DrawnQuestion:
    """A question with everything that may be shown with it."""

    source: SourceQuestion
    gold: Piece
    holds_answer: bool
    """Whether every gold piece holds an answer word for word; else it is the nearest piece of the gold passages."""
    distractors: tuple[Piece, ...]
    """At least one fewer than the most passages asked for."""
    absent: tuple[Piece, ...]
    """What is shown without gold: no piece of a gold passage is among them. Empty where that is not asked."""
    place: float
    """Where the gold piece stands, in [0, 1)."""
    further: tuple[Piece, ...] = ()
    """Gold pieces of the question's parts after the first."""

    @property
    def golds(self) -> tuple[Piece, ...]:
        """A gold piece for each of the question's parts."""
        return (self.gold, *self.further)

    def passages(self, count: int, place: int | None = None) -> tuple[Piece, ...]:
        """``count`` passages with the gold one at index ``place``; None: at the drawn place.

        Further gold ones come before all distractors.
        """
        index = int(self.place * count) if place is None else place
        others = (*self.further, *self.distractors)[: count - 1]
        return (*others[:index], self.gold, *others[index:])


@dataclass(frozen=True)
class Draw:
    """The questions that are asked, and how many were passed over."""

    questions: tuple[DrawnQuestion, ...]
    without_gold: int
    """Passed over: the file names no answer or no gold passage."""


def draw_questions(
    data: QuestionData,
    pieces: PieceMaker,
    *,
    count: int,
    most_passages: int,
    absent_passages: int,
    distractors: Distractors,
    seed: int = 0,
) -> Draw:
    """The first ``count`` questions of ``data`` that have an answer and a gold passage, with their distractors.

    ``same``: passages of the same kind, of each the piece nearest to the question, and the gold passages' other
    pieces, in random order. ``bm25`` and ``dense``: ranked by the retriever's model among the other pieces of the
    file (of pattern questions: of the articles and tables of the questions drawn). ``random``: any passages. A kind
    that gives too few is filled up with random ones. A piece of the gold passage that holds an answer is never a
    distractor; one of another passage that does is none either, but for ``same``, where the file itself says that
    the passages answer something else.

    ``absent_passages``: how many are shown without the gold one; 0: that is not asked.

    Raises ``SetupError`` where there is no question to ask or there are fewer passages than are to be shown.
    """
    chosen, without_gold = data.first(count)
    source = _Source(data, pieces, chosen, distractors)
    drawn = tuple(
        _draw(question, source, most_passages - 1, absent_passages, Random(f"{seed} {number} {question.id}"))
        for number, question in enumerate(chosen)
    )
    return Draw(drawn, without_gold)


class _Source:
    """Candidates for distractors."""

    def __init__(
        self, data: QuestionData, pieces: PieceMaker, chosen: Sequence[SourceQuestion], kind: Distractors
    ) -> None:
        self.data = data
        self.kind = kind
        self.make = pieces
        self._ranked: list[tuple[int, Piece]] = []
        self._rank: Rank | None = None
        if kind in ("bm25", "dense"):
            self._ranked = [(number, piece) for number in data.searched(chosen) for piece in self.pieces(number)]
            make: Callable[[Sequence[Piece]], Rank] = bm25_ranking if kind == "bm25" else dense_ranking
            self._rank = make([piece for _, piece in self._ranked])

    def pieces(self, number: int) -> tuple[Piece, ...]:
        return self.make.pieces(self.data.passages[number])

    def candidates(self, question: SourceQuestion, random: Random) -> Iterator[tuple[int, Piece]]:
        """Number of the passage and piece, best distractor first; the gold piece and repetitions among them."""
        if self._rank is not None:
            for place in self._rank(question.text):
                yield self._ranked[place]
        elif self.kind == "same":
            near = [(number, self._nearest(number, question)) for number in question.same_kind]
            own = [(number, piece) for number in question.gold for piece in self.pieces(number)]
            found = [(number, piece) for number, piece in (*near, *own) if piece is not None]
            yield from random.sample(found, len(found))
        for number in _in_random_order(len(self.data.passages), random):
            piece = self._nearest(number, question)
            if piece is not None:
                yield number, piece

    def _nearest(self, number: int, question: SourceQuestion) -> Piece | None:
        pieces = self.pieces(number)
        return nearest_piece(pieces, question.text) if pieces else None


def _draw(question: SourceQuestion, source: _Source, beside: int, without: int, random: Random) -> DrawnQuestion:
    golds, held = zip(*(_gold(part, source) for part in question.parts), strict=True)
    place = random.random()
    texts = {source.data.passages[number].text for number in question.gold}
    same_kind = set(question.same_kind) if source.kind == "same" else set()
    distractors: dict[Piece, None] = {}
    absent: dict[Piece, None] = {}
    candidates = source.candidates(question, random)
    while len(distractors) < beside or len(absent) < without:
        candidate = next(candidates, None)
        if candidate is None:
            shown = max(beside + 1, without)
            raise SetupError(f"{source.data.name}: too few passages to show {shown} with question {question.id}")
        number, piece = candidate
        # A redirect gives an article a second url: its intro is the gold passage again.
        is_own = source.data.passages[number].text in texts
        believed = number in same_kind and not is_own
        if piece in golds or (not believed and any(contains(piece.text, part.answers) for part in question.parts)):
            continue
        if len(distractors) < beside and (not is_own or number in question.gold):
            distractors[piece] = None
        if len(absent) < without and not is_own:
            absent[piece] = None
    return DrawnQuestion(question, golds[0], all(held), tuple(distractors), tuple(absent), place, golds[1:])


def _gold(question: SourceQuestion, source: _Source) -> tuple[Piece, bool]:
    own = [piece for number in question.gold for piece in source.pieces(number)]
    if not own:
        raise SetupError(f"{source.data.name}: question {question.id}: the gold passage has no text")
    return gold_piece(own, question)


def _in_random_order(count: int, random: Random) -> Iterator[int]:
    """0 … count - 1; lazily for the first few, because few are ever used."""
    seen: set[int] = set()
    while len(seen) < min(count, 200):
        number = random.randrange(count)
        if number not in seen:
            seen.add(number)
            yield number
    rest = [number for number in range(count) if number not in seen]
    yield from random.sample(rest, len(rest))
