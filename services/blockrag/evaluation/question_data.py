"""Question files in one form: questions, the passages that answer them, and the passages that do not.

Three formats, told apart by their first line:

- question rows ``{question, answers, passages: [{title, text, gold}]}``;
- key-value look-ups ``{ordered_kv_records: [[key, value]], key, value}`` (Lost in the Middle, arXiv 2307.03172, section
  3): each record is a passage;
- pattern questions ``{url, question, answers, rel, distractor_table}`` about intros in ``wiki_intros.jsonl.gz``, with
  ``wiki_table_to_urls.json.gz`` naming articles of the same kind; both files stand beside the questions or in a
  sibling folder ``train/``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from blockrag.errors import SetupError
from blockrag.jsonl import read_objects
from blockrag.modeling.bundle import file_sha256

PATTERN_QUESTIONS = "dev/wiki_pattern_qa.jsonl.gz"
INTROS = "wiki_intros.jsonl.gz"
TABLES = "wiki_table_to_urls.json.gz"


@dataclass(frozen=True)
class SourcePassage:
    """A titled text, before it is split."""

    title: str
    text: str
    """White space collapsed: line breaks of a file's layout are no part of the text."""


@dataclass(frozen=True)
class SourceQuestion:
    """A question of a file."""

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """Numbers of the passages that answer it, in ``QuestionData.passages``; empty where the file names none."""
    same_kind: tuple[int, ...]
    """Numbers of passages of the same kind: of the same table, or the row's own others."""
    group: str = ""
    """Relation or source; scores are broken down by it."""
    asks: tuple[SourceQuestion, ...] = ()
    """The questions that it asks as one; empty where it is one."""

    @property
    def parts(self) -> tuple[SourceQuestion, ...]:
        """Single questions, each with answers and gold passages of its own."""
        return self.asks or (self,)


@dataclass(frozen=True)
class QuestionData:
    """Questions in the drawn order, and every passage that may be shown with them."""

    name: str
    kind: str
    """"rows", "pattern" or "key-value"."""
    questions: Sequence[SourceQuestion]
    passages: Sequence[SourcePassage]
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Hex digest of every file read, by file name."""

    def first(self, count: int) -> tuple[Sequence[SourceQuestion], int]:
        """The first ``count`` questions with an answer and a gold passage, and how many others were passed over.

        Raises ``SetupError`` where there is none.
        """
        usable = [question for question in self.questions if question.gold and question.answers]
        if not usable:
            raise SetupError(f"{self.name}: no question has both an answer and a gold passage")
        chosen = usable[:count]
        return chosen, self.questions.index(chosen[-1]) + 1 - len(chosen)

    def searched(self, chosen: Sequence[SourceQuestion]) -> Sequence[int]:
        """Numbers of the passages that a ranking for the ``chosen`` questions searches.

        All; but of pattern questions those of the chosen ones' articles and tables, because splitting and embedding
        hundreds of thousands of intros takes longer than asking.
        """
        if self.kind != "pattern":
            return range(len(self.passages))
        return sorted({number for question in chosen for number in (*question.gold, *question.same_kind)})


def load_questions(path: Path, seed: int = 0) -> QuestionData:
    """Read a file of questions, or the pattern questions of a data directory, shuffled by ``seed``.

    Raises ``SetupError`` naming file and line for what is missing or malformed.
    """
    file = path / PATTERN_QUESTIONS if path.is_dir() else path
    first = next(read_objects(file), None)
    if first is None:
        raise SetupError(f"{file}: no questions")
    if "passages" in first[1]:
        return _load_rows(file, seed)
    if "ordered_kv_records" in first[1]:
        return _load_key_values(file, seed)
    if {"url", "question", "answers"} <= first[1].keys():
        return _load_patterns(file, seed)
    raise SetupError(f"{file}:1: neither a question with passages, a pattern question with a url nor key-value records")


class PassageNumbers:
    """Numbers passages as they come; equal ones get one number."""

    def __init__(self) -> None:
        self.passages: list[SourcePassage] = []
        self._numbers: dict[SourcePassage, int] = {}

    def add(self, title: str, text: str) -> int:
        passage = SourcePassage(" ".join(title.split()), " ".join(text.split()))
        number = self._numbers.setdefault(passage, len(self.passages))
        if number == len(self.passages):
            self.passages.append(passage)
        return number


def _load_rows(file: Path, seed: int) -> QuestionData:
    numbers = PassageNumbers()
    questions = []
    for where, row in read_objects(file):
        passages = row.get("passages")
        if not isinstance(passages, list) or not passages:
            raise SetupError(f"{where}: passages must be a list of at least one")
        gold: list[int] = []
        others: list[int] = []
        for passage in passages:
            if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
                raise SetupError(f"{where}: a passage must have title, text and gold")
            (gold if passage.get("gold") else others).append(
                numbers.add(str(passage.get("title", "")), passage["text"])
            )
        text, answers = _question_and_answers(row, where)
        questions.append(
            SourceQuestion(
                id=str(row.get("id") or _line(where)),
                text=text,
                answers=answers,
                gold=tuple(dict.fromkeys(gold)),
                same_kind=tuple(dict.fromkeys(number for number in others if number not in gold)),
                group=str(row.get("source") or ""),
            )
        )
    Random(seed).shuffle(questions)
    return QuestionData(_name(file), "rows", questions, numbers.passages, {file.name: file_sha256(file)})


def _load_key_values(file: Path, seed: int) -> QuestionData:
    numbers = PassageNumbers()
    questions = []
    for where, row in read_objects(file):
        records, key, value = row.get("ordered_kv_records"), row.get("key"), row.get("value")
        if not isinstance(records, list) or not all(isinstance(each, list) and len(each) == 2 for each in records):
            raise SetupError(f"{where}: ordered_kv_records must be a list of pairs")
        if [key, value] not in records:
            raise SetupError(f"{where}: key and value must be one of the records")
        shown = [
            numbers.add(f"Record {number}", f'"{name}": "{content}".')
            for number, (name, content) in enumerate(records, 1)
        ]
        gold = shown[records.index([key, value])]
        questions.append(
            SourceQuestion(
                id=_line(where),
                text=f"What is the value of {key}?",
                answers=(str(value),),
                gold=(gold,),
                same_kind=tuple(number for number in shown if number != gold),
            )
        )
    Random(seed).shuffle(questions)
    return QuestionData(_name(file), "key-value", questions, numbers.passages, {file.name: file_sha256(file)})


def _load_patterns(file: Path, seed: int) -> QuestionData:
    intros_file, tables_file = _beside(file, INTROS), _beside(file, TABLES)
    numbers = PassageNumbers()
    by_url: dict[str, int] = {}
    for where, row in read_objects(intros_file):
        try:
            by_url[row["url"]] = numbers.add(row["title"], row["text"])
        except (KeyError, AttributeError) as error:
            raise SetupError(f"{where}: needs url, title and text") from error
    tables = _read_tables(tables_file)
    kinds: dict[str, tuple[int, ...]] = {}
    questions = []
    for where, row in read_objects(file):
        text, answers = _question_and_answers(row, where)
        if row.get("url") not in by_url:
            raise SetupError(f"{where}: no intro with the url {row.get('url')!r} in {intros_file.name}")
        table = row.get("distractor_table") or ""
        if table not in kinds:
            kinds[table] = tuple(dict.fromkeys(by_url[url] for url in tables.get(table, ()) if url in by_url))
        questions.append(
            SourceQuestion(
                id=f"{row['url']}#{row.get('rel', '')}",
                text=text,
                answers=answers,
                gold=(by_url[row["url"]],),
                same_kind=kinds[table],
                group=str(row.get("rel") or ""),
            )
        )
    Random(seed).shuffle(questions)
    digests = {each.name: file_sha256(each) for each in (file, intros_file, tables_file)}
    return QuestionData(_name(file), "pattern", questions, numbers.passages, digests)


def _question_and_answers(row: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    text, answers = row.get("question"), row.get("answers")
    if not isinstance(text, str) or not text.strip():
        raise SetupError(f"{where}: question must be a text")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise SetupError(f"{where}: answers must be a list of texts")
    return " ".join(text.split()), tuple(answer for answer in answers if answer.strip())


def _read_tables(file: Path) -> dict[str, list[str]]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as source:
            tables = json.load(source)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SetupError(f"{file}: {error}") from error
    if not isinstance(tables, dict):
        raise SetupError(f"{file}: must hold a JSON object of urls by table")
    return tables


def _beside(file: Path, name: str) -> Path:
    for folder in (file.parent, file.parent.parent / "train"):
        if (folder / name).is_file():
            return folder / name
    raise SetupError(f"{file}: pattern questions need {name} beside them or in ../train")


def _line(place: str) -> str:
    return place.rpartition(":")[2]


def _name(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".jsonl")
