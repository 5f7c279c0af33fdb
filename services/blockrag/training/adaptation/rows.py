"""Question rows: what an adaptation trains and measures on.

One JSON object per line::

    {"question": "…", "answers": ["…", …], "passages": [{"title": "…", "text": "…", "gold": true}, …]}

Other keys are ignored; ``title`` and ``gold`` may be absent. A row without a gold passage is a question that the
passages do not answer; only such a row may have an empty list of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from blockrag.errors import SetupError
from blockrag.jsonl import read_objects

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
    files = data_files(paths)
    rows = [_parse(place, values) for file in files for place, values in read_objects(file)]
    if not rows:
        raise SetupError(f"{', '.join(map(str, files))}: no rows")
    return rows


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
