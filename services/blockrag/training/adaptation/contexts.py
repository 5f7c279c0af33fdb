"""Many questions behind one context: passages once, then every question that they answer, and some that they do not.

A context is drawn around one question, the lead: its gold passage (or, for a refusal, everything but that), passages
that are easily mistaken for it, passages at random; then the other questions whose answers stand in what is shown. Each
question sees the context and itself. With one question per context, 650 tokens are computed for one answer; so they are
for ten.

Context number n is a pure function of (seed, n), as samples are.

They are drawn from pools of questions that share their passages. Any question file that ``blockrag eval qa`` reads
makes a pool. Its passages are cut as ingestion cuts them and ranked by the retriever's BM25, so that what is trained
looks like what is served.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import ClassVar

from blockrag.errors import SetupError
from blockrag.evaluation.drawing import Piece, PieceMaker, Rank, bm25_ranking, gold_piece
from blockrag.evaluation.question_data import QuestionData, SourceQuestion, load_questions
from blockrag.evaluation.scoring import contains
from blockrag.modeling.template import BundleTokenizer, PromptTemplate
from blockrag.training.adaptation.batch import Branch, Context
from blockrag.training.adaptation.samples import SampleLimits

_WORDS = re.compile(r"[a-z0-9]+")


class OverlapFilter:
    """Finds texts that share ``length`` words in a row with one of the texts it was made of.

    Case, punctuation and spacing do not count. Of the texts tested only every ``stride``-th place is looked at, so
    that a shared run of ``length + stride - 1`` words is always found and a shorter one sometimes.
    """

    def __init__(self, texts: Iterable[str], length: int = 12, stride: int = 5) -> None:
        self._length = length
        self._stride = stride
        self._known: set[int] = set()
        for text in texts:
            words = _WORDS.findall(text.lower())
            self._known.update(hash(tuple(words[n : n + length])) for n in range(len(words) - length + 1))

    def __call__(self, text: str) -> bool:
        """Whether ``text`` shares a run of words."""
        if not self._known:
            return False
        words = _WORDS.findall(text.lower())
        places = range(0, len(words) - self._length + 1, self._stride)
        return any(hash(tuple(words[n : n + self._length])) in self._known for n in places)


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


_TRIES = 50
_REMEMBERED = 50_000
_HARD_SHARE = 0.7
"""Share of distractors that are near to the lead: of its kind, of its title or ranked high for it."""
_PER_PASSAGE = 4
"""Most questions of one passage in a context."""
_BESIDE_SHARE = 0.5
"""Share of contexts that show what stands beside the lead's gold piece in its passage: a search finds both."""
_TYPED_SHARE = 0.25
"""Share of questions written as people type them into a search box: in lower case, half of them without the mark."""


@dataclass
class ContextSource:
    """Makes contexts of pools. Not thread-safe: one thread draws."""

    pools: Sequence[tuple[Pool, float]]
    """With their shares of the contexts."""
    tokenizer: BundleTokenizer
    template: PromptTemplate
    limits: SampleLimits
    questions: int
    """Most of a context."""
    seed: int | str
    too_long: ClassVar[dict[str, int]] = {}
    """Empty: a context is cut to what fits."""

    def __post_init__(self) -> None:
        self._instruction = tuple(self.template.instruction_ids(self.tokenizer))
        self._block = lru_cache(maxsize=_REMEMBERED)(self._make_block)

    def sample(self, number: int) -> Context:
        """Context ``number`` of an endless stream. Raises SetupError when nothing that is drawn fits."""
        random = Random(f"{self.seed}/{number}")
        for _ in range(_TRIES):
            pools, shares = zip(*self.pools, strict=True)
            pool = random.choices(pools, shares)[0]
            context = self._build(pool, random.choice(pool.questions), random)
            if context is not None:
                return context
        raise SetupError(f"{_TRIES} contexts one after another do not fit {self.limits.max_tokens} tokens")

    def _build(self, pool: Pool, lead: SourceQuestion, random: Random) -> Context | None:
        limits = self.limits
        found = pool.gold(lead)
        if found is None:
            return None
        absent = bool(lead.answers) and random.random() < limits.refusal_share
        # log-uniform: small contexts hold more answers a token, large ones must be met too
        spread = random.uniform(math.log(limits.min_passages), math.log(limits.max_passages + 1))
        count = min(limits.max_passages, int(math.exp(spread)))
        shown: dict[Piece, int] = {} if absent else {found[1]: found[0]}
        near = pool.near(lead, random)
        unseen = [number for number in near if pool.asked_of(number)]
        if random.random() < _BESIDE_SHARE:
            beside = [p for p in pool.pieces(found[0]) if p != found[1] and not contains(p.text, lead.answers)]
            # at most half of the context: the rest is of other passages
            shown.update((piece, found[0]) for piece in random.sample(beside, min(len(beside), count // 2)))
        self._fill(shown, count, pool, lead, near, random)
        if not shown:
            return None
        asked = [(lead, absent)]
        others = [
            question
            for piece, number in shown.items()
            for question in self._answered(pool, piece, number, random)
            if question is not lead
        ]
        random.shuffle(others)
        for question in others[: self.questions - 1]:
            if random.random() < limits.refusal_share:
                hidden = self._hidden(pool, shown, unseen, random)
                if hidden is not None and all(hidden is not other for other, _ in asked):
                    asked.append((hidden, True))
                    continue
            asked.append((question, False))
        return self._context(shown, asked, random)

    def _fill(
        self,
        shown: dict[Piece, int],
        count: int,
        pool: Pool,
        lead: SourceQuestion,
        near: Sequence[int],
        random: Random,
    ) -> None:
        """Add pieces that do not answer the lead until ``count`` are shown."""
        waiting = list(near)
        for _ in range(_TRIES + 4 * count):
            if len(shown) >= count:
                return
            hard = waiting and random.random() < _HARD_SHARE
            number = waiting.pop() if hard else pool.any(random)
            pieces = pool.pieces(number)
            if not pieces or number in lead.gold:
                continue
            questions = [question for question in pool.asked_of(number) if question.answers]
            piece = random.choice(pieces)
            if questions:
                gold = pool.gold(random.choice(questions))
                piece = gold[1] if gold is not None and gold[0] == number else piece
            # of one kind, what a passage says of another entity may be the same word and is no answer
            if piece in shown or (number not in lead.same_kind and contains(piece.text, lead.answers)):
                continue
            shown[piece] = number

    def _answered(self, pool: Pool, piece: Piece, number: int, random: Random) -> list[SourceQuestion]:
        questions = list(pool.asked_of(number))
        random.shuffle(questions)
        found = []
        for question in questions[: 3 * _PER_PASSAGE]:
            if question.answers and pool.gold(question) == (number, piece):
                found.append(question)
            if len(found) == _PER_PASSAGE:
                break
        return found

    def _hidden(
        self, pool: Pool, shown: dict[Piece, int], unseen: Sequence[int], random: Random
    ) -> SourceQuestion | None:
        """A question that nothing shown answers, of a passage near to those shown where there is one."""
        numbers = set(shown.values())
        for _ in range(_TRIES):
            number = random.choice(unseen) if unseen and random.random() < _HARD_SHARE else pool.any(random)
            questions = [question for question in pool.asked_of(number) if question.answers]
            if number in numbers or not questions:
                continue
            question = random.choice(questions)
            if not numbers.intersection(question.gold) and not any(
                contains(piece.text, question.answers) for piece in shown
            ):
                return question
        return None

    def _context(
        self, shown: dict[Piece, int], asked: Sequence[tuple[SourceQuestion, bool]], random: Random
    ) -> Context | None:
        blocks = [block for block in map(self._block, shown) if block]
        random.shuffle(blocks)
        room = self.limits.max_tokens - len(self._instruction) - sum(map(len, blocks))
        branches = []
        for question, refused in asked:
            prompt = tuple(self.template.final_ids(self.tokenizer, _typed(question.text, random)))
            answer = self.template.refusal if refused or not question.answers else self._answer(question, shown)
            target = tuple(self.template.answer_ids(self.tokenizer, answer))
            room -= len(prompt) + len(target)
            if room < 0:
                break
            branches.append(Branch(prompt, target))
        return Context(self._instruction, tuple(blocks), tuple(branches)) if branches else None

    @staticmethod
    def _answer(question: SourceQuestion, shown: Iterable[Piece]) -> str:
        """The answer as a passage that is shown writes it."""
        texts = [piece.text for piece in shown]
        return next((a for a in question.answers if any(a in text for text in texts)), question.answers[0])

    def _make_block(self, piece: Piece) -> tuple[int, ...]:
        return tuple(self.template.passage_ids(self.tokenizer, piece.title, piece.text))


def _typed(question: str, random: Random) -> str:
    if random.random() >= _TYPED_SHARE:
        return question
    return question.lower().rstrip("?") if random.random() < 0.5 else question.lower()
