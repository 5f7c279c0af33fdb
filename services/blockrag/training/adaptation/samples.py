"""From question rows to training samples: which passages, in what order, cut at sentence ends, with which answer.

Sample number n is a pure function of (seed, n): a run that is resumed, or shared out to other workers, sees the same
samples, and no position in the data has to be stored.

A question row is one JSON object a line::

    {"question": "…", "answers": ["…", …], "passages": [{"title": "…", "text": "…", "gold": true}, …]}

Other keys are ignored; ``title`` and ``gold`` may be absent. A row without a gold passage is a question that the
passages do not answer; only such a row may have an empty list of answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

from blockrag.errors import SetupError
from blockrag.jsonl import read_objects
from blockrag.modeling.running_text import field_ids
from blockrag.modeling.template import BundleTokenizer, PromptTemplate
from blockrag.training.adaptation.batch import Branch, Context

T = TypeVar("T")


class DecodingTokenizer(BundleTokenizer, Protocol):
    """A tokenizer that also turns token ids back into text."""

    def decode(self, token_ids: list[int]) -> Any: ...


# An abbreviation's or initial's period ends no sentence; the pattern errs towards longer sentences.
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]\"'%])[.!?][\"')\]]* +(?=[A-Z\"'(])|\n+")


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, without the spaces between them."""
    found: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        found.append(text[start : match.end()].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def cut_passage(
    tokenizer: DecodingTokenizer, template: PromptTemplate, title: str, text: str, max_tokens: int, first: int = 0
) -> str:
    """The longest run of whole sentences from number ``first`` whose block has at most ``max_tokens`` tokens.

    The block counts title and special tokens. A first sentence that alone is too long is cut after a word.
    """
    room = max_tokens - len(template.passage_ids(tokenizer, title, ""))
    kept: list[str] = []
    for sentence in sentences(text)[first:]:
        tokens = field_ids(tokenizer, " " + sentence)
        if len(tokens) > room:
            if not kept and room > 0:
                kept.append(tokenizer.decode(tokens[:room]).strip().rpartition(" ")[0])
            break
        kept.append(sentence)
        room -= len(tokens)
    return " ".join(kept)


_SUFFIXES = (".jsonl", ".jsonl.gz")
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Passage:
    """A passage of a row."""

    title: str
    text: str
    gold: bool
    """Whether it holds the answer."""


@dataclass(frozen=True)
class Row:
    """A question with its answers and passages."""

    place: str
    """File and line, for messages."""
    question: str
    answers: tuple[str, ...]
    """Accepted answers; the first is the one that training aims at."""
    passages: tuple[Passage, ...]


def data_files(paths: Sequence[Path]) -> list[Path]:
    """The files that ``paths`` name; of a directory, its JSONL files by name. Raises SetupError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
            if not inside:
                raise SetupError(f"{path}: no {' or '.join(_SUFFIXES)} file in this directory")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SetupError(f"{path}: no such file or directory")
    return found


def hold_out_rows(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to measure on: ``count``, at most a tenth of all."""
    count = min(count, int(_HELD_OUT_SHARE * len(rows)))
    chosen = set(Random(f"{seed}/held out").sample(range(len(rows)), count))
    return [row for number, row in enumerate(rows) if number not in chosen], [rows[n] for n in sorted(chosen)]


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """All rows, in order. Raises SetupError naming file and line of the first bad row, or when there is none."""
    return read_parsed(paths, _parse, "rows")


def read_parsed(paths: Sequence[Path], parse: Callable[[str, Mapping[str, Any]], T], what: str) -> list[T]:
    """What ``parse`` makes of every object, in order, with where it stands. Raises SetupError when there is none."""
    files = data_files(paths)
    found = [parse(place, values) for file in files for place, values in read_objects(file)]
    if not found:
        raise SetupError(f"{', '.join(map(str, files))}: no {what}")
    return found


def _parse(place: str, values: Mapping[str, Any]) -> Row:
    passages = values.get("passages")
    if not isinstance(passages, list) or not passages:
        raise SetupError(f"{place}: passages must be a list with at least one passage")
    checked = tuple(_passage(f"{place}: passages[{number}]", passage) for number, passage in enumerate(passages))
    answers = values.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise SetupError(f"{place}: answers must be a list of texts")
    if not answers and any(passage.gold for passage in checked):
        raise SetupError(f"{place}: no answer, though a passage is marked gold")
    return Row(place, _text(place, values, "question"), tuple(answers), checked)


def _passage(where: str, values: Any) -> Passage:
    if not isinstance(values, dict):
        raise SetupError(f"{where}: must be a JSON object")
    title, gold = values.get("title", ""), values.get("gold", False)
    if not isinstance(title, str):
        raise SetupError(f"{where}: title must be a text")
    if not isinstance(gold, bool):
        raise SetupError(f"{where}: gold must be true or false")
    return Passage(title, _text(where, values, "text"), gold)


def _text(where: str, values: Mapping[str, Any], field: str) -> str:
    value = values.get(field)
    if not isinstance(value, str) or not value.strip():
        raise SetupError(f"{where}: {field} must be a text that is not empty")
    return value


_TRIES = 50
_REMEMBERED = 50_000


@dataclass(frozen=True)
class SampleLimits:
    """Bounds of a sample."""

    min_passages: int
    max_passages: int
    passage_tokens: int
    """Most tokens of a passage's block. Longer passages are cut at sentence ends, the gold ones around the answer."""
    max_tokens: int
    """Most tokens of a sample; distractors are left out until it fits."""
    refusal_share: float
    """Share of samples whose gold passages are left out, answered by the template's refusal."""


@dataclass
class SampleSource:
    """Makes samples of rows. Not thread-safe: one thread draws."""

    rows: Sequence[Row]
    tokenizer: DecodingTokenizer
    template: PromptTemplate
    limits: SampleLimits
    seed: int | str
    too_long: dict[str, int] = field(default_factory=dict)
    """Rows that were left out, by file and line, with the tokens that they need at least."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise SetupError("no rows to draw samples from")
        self._instruction = tuple(self.template.instruction_ids(self.tokenizer))
        self._order: tuple[int, list[int]] = (-1, [])
        self._block = lru_cache(maxsize=_REMEMBERED)(self._make_block)

    def sample(self, number: int) -> Context:
        """Sample ``number``, of one question, of an endless stream that visits every row once per pass over the data.

        A row that cannot be fitted is noted in ``too_long`` and another one takes its place. Raises SetupError when
        none seems to fit.
        """
        random = Random(f"{self.seed}/{number}")
        row = self.rows[self._place(number)]
        for _ in range(_TRIES):
            sample = self._build(row, random)
            if sample is not None:
                return sample
            row = random.choice(self.rows)
        if not self.too_long:
            raise SetupError(
                f"{_TRIES} rows one after another have nothing to show: mark the passages that answer with "
                '"gold": true, or give questions without one passages of other rows'
            )
        place, tokens = next(iter(self.too_long.items()))
        raise SetupError(
            f"{_TRIES} rows one after another do not fit {self.limits.max_tokens} tokens; {place} needs {tokens}: "
            "raise max_tokens or lower passage_tokens"
        )

    def _place(self, number: int) -> int:
        turn, at = divmod(number, len(self.rows))
        if self._order[0] != turn:
            order = list(range(len(self.rows)))
            Random(f"{self.seed}/order/{turn}").shuffle(order)
            self._order = (turn, order)
        return self._order[1][at]

    def _build(self, row: Row, random: Random) -> Context | None:
        limits, template = self.limits, self.template
        golds = [passage for passage in row.passages if passage.gold]
        # those that hold an answer first, in case there are more than a prompt may have
        golds.sort(key=lambda passage: not _holds(passage.text, row.answers))
        golds = golds[: limits.max_passages]
        absent = random.random() < limits.refusal_share or not golds
        count = random.randint(limits.min_passages, limits.max_passages)
        chosen = [] if absent else golds
        blocks = [self._gold_block(passage, row.answers, random) for passage in chosen]
        others = self._distractors(row, max(0, count - len(chosen)), absent, random)
        if absent and not others:
            return None
        prompt = tuple(template.final_ids(self.tokenizer, row.question))
        answer = template.refusal if absent else row.answers[0]
        target = tuple(template.answer_ids(self.tokenizer, answer))
        room = limits.max_tokens - len(self._instruction) - len(prompt) - len(target) - sum(map(len, blocks))
        fitting = []
        for block in others:
            if len(block) <= room:
                fitting.append(block)
                room -= len(block)
        if room < 0 or (absent and not fitting):
            needed = limits.max_tokens - room + (len(others[0]) if absent and room >= 0 else 0)
            self.too_long.setdefault(row.place, needed)
            return None
        placed = [*blocks, *fitting]
        random.shuffle(placed)
        return Context(self._instruction, tuple(placed), (Branch(prompt, target),))

    def _distractors(self, row: Row, count: int, absent: bool, random: Random) -> list[tuple[int, ...]]:
        """Blocks of the row's own other passages, filled up with those of other rows."""
        own = [passage for passage in row.passages if not passage.gold]
        if absent:  # then nothing shown may hold the answer
            own = [passage for passage in own if not _holds(passage.text, row.answers)]
        random.shuffle(own)
        seen = {passage.text for passage in row.passages}
        blocks = [block for block in map(self._block, own[:count]) if block]
        for _ in range(_TRIES + 4 * count):
            if len(blocks) == count:
                break
            passage = random.choice(random.choice(self.rows).passages)
            if passage.text in seen or _holds(passage.text, row.answers):
                continue
            seen.add(passage.text)
            block = self._block(passage)
            if block:
                blocks.append(block)
        return blocks

    def _make_block(self, passage: Passage) -> tuple[int, ...]:
        """A distractor's block, remembered: its passage is met again and again. Empty when only its title fits."""
        text = self._text(passage, 0)
        return tuple(self.template.passage_ids(self.tokenizer, passage.title, text)) if text else ()

    def _gold_block(self, passage: Passage, answers: Sequence[str], random: Random) -> tuple[int, ...]:
        """A gold passage's block: a run of sentences with the answer's anywhere in it."""
        text = self._text(passage, 0)
        if not _holds(text, answers) and _holds(passage.text, answers):
            asked = [n for n, sentence in enumerate(sentences(passage.text)) if _holds(sentence, answers)]
            last = asked[0] if asked else 0
            for first in (random.randint(0, last), max(0, last - 1), last):
                window = self._text(passage, first)
                if _holds(window, answers):
                    text = window
                    break
        return tuple(self.template.passage_ids(self.tokenizer, passage.title, text))

    def _text(self, passage: Passage, first: int) -> str:
        limit = self.limits.passage_tokens
        return cut_passage(self.tokenizer, self.template, passage.title, passage.text, limit, first=first)


def _holds(text: str, answers: Sequence[str]) -> bool:
    lowered = text.lower()
    return any(answer.lower() in lowered for answer in answers)
