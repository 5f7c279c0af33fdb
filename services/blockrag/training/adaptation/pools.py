"""Pools of questions that share their passages: what contexts with many questions are drawn from.

Any question file that ``blockrag eval qa`` reads makes a pool. Its passages are cut as ingestion cuts them and ranked
by the retriever's BM25, so that what is trained looks like what is served.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from blockrag.errors import SetupError
from blockrag.evaluation.pieces import Piece, PieceMaker, gold_piece
from blockrag.evaluation.question_data import QuestionData, SourceQuestion, load_questions
from blockrag.evaluation.ranking import Rank, bm25_ranking
from blockrag.training.overlap import OverlapFilter

_NEAREST = 24
"""Of a ranking: passages that stand in for the gold one when distractors are drawn."""


class Pool:
    """Questions of one file with the passages they are about, cut as ingestion cuts them."""

    def __init__(self, data: QuestionData, pieces: PieceMaker, excluded: set[int]) -> None:
        """``excluded``: numbers of passages that must not be shown."""
        self._data = data
        self._pieces = pieces
        self._excluded = excluded
        self.questions = [q for q in data.questions if q.gold and not excluded.intersection(q.gold)]
        if not self.questions:
            raise SetupError(f"{data.name}: no question has a gold passage that may be trained on")
        self._asked: dict[int, list[SourceQuestion]] = {}
        for question in self.questions:
            for number in question.gold:
                self._asked.setdefault(number, []).append(question)
        self._titles: dict[str, list[int]] = {}
        self._shown = sorted(self._asked) if data.kind == "pattern" else self._allowed(range(len(data.passages)))
        for number in self._shown:
            self._titles.setdefault(data.passages[number].title, []).append(number)
        self._rank: Rank | None = None
        self._ranked: list[int] = []

    def _allowed(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number not in self._excluded]

    def pieces(self, number: int) -> tuple[Piece, ...]:
        return self._pieces.pieces(self._data.passages[number])

    def gold(self, question: SourceQuestion) -> tuple[int, Piece] | None:
        """The passage and the piece that answers; None where no piece holds an answer and one is expected."""
        for number in question.gold:
            pieces = self.pieces(number)
            if not pieces:
                continue
            piece, holds = gold_piece(pieces, question)
            if holds or not question.answers:
                return number, piece
        return None

    def asked_of(self, number: int) -> Sequence[SourceQuestion]:
        """Questions whose gold passage is ``number``."""
        return self._asked.get(number, ())

    def near(self, question: SourceQuestion, random: Random) -> list[int]:
        """Passages that are easily mistaken for the gold one, in random order."""
        kind = self._allowed(question.same_kind)
        titled = [n for gold in question.gold for n in self._titles.get(self._data.passages[gold].title, ())]
        ranked = self._ranking(question.text) if self._data.kind == "rows" else []
        found = [
            *random.sample(kind, min(len(kind), _NEAREST)),
            *random.sample(titled, min(len(titled), _NEAREST // 2)),
            *ranked,
        ]
        unique = [number for number in dict.fromkeys(found) if number not in question.gold]
        random.shuffle(unique)
        return unique

    def any(self, random: Random) -> int:
        return random.choice(self._shown)

    def _ranking(self, text: str) -> list[int]:
        if self._rank is None:
            self._ranked = [n for n in self._shown if self._data.passages[n].text]
            passages = [self._data.passages[n] for n in self._ranked]
            self._rank = bm25_ranking([Piece(passage.title, passage.text) for passage in passages])
        return [self._ranked[place] for place in self._rank(text)[:_NEAREST]]


class Excluded:
    """Passages of files that are evaluated on, which training must not see."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Of question rows, what shares words in a row with a passage (``OverlapFilter``); of intros that pattern
        questions are about, the same texts: two intros of one kind share more words than that."""
        self._texts: set[str] = set()
        rows: set[str] = set()
        for file in files:
            data = load_questions(file)
            if data.kind == "pattern":
                self._texts |= {data.passages[number].text for question in data.questions for number in question.gold}
            else:
                rows |= {passage.text for passage in data.passages}
        self._overlaps = OverlapFilter(rows)

    def __call__(self, text: str) -> bool:
        return text in self._texts or self._overlaps(text)


def load_pools(files: Sequence[Path], pieces: PieceMaker, exclude: Sequence[Path]) -> list[Pool]:
    """A pool of each file. Raises SetupError naming file and line of what is malformed, or a file with nothing left."""
    excluded = Excluded(exclude)
    pools = []
    for file in files:
        data = load_questions(file)
        numbers = {number for number, passage in enumerate(data.passages) if excluded(passage.text)}
        pools.append(Pool(data, pieces, numbers))
    return pools
