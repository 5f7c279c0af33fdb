"""The training files: what is read from a ``--data`` directory, and what is kept away from training.

The directory has two folders. ``train/`` holds titled article intros, questions made from them by patterns, tables of
articles of the same kind, and questions asked by people on short paragraphs. ``dev/`` is read for one purpose: to know
which articles must not be trained on.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTROS = "train/wiki_intros.jsonl.gz"
PATTERN_QUESTIONS = "train/wiki_pattern_qa.jsonl.gz"
TABLES = "train/wiki_table_to_urls.json.gz"
DEV_QUESTIONS = "dev/wiki_pattern_qa.jsonl.gz"
PEOPLE_QUESTIONS = (
    "train/qamr_dev.jsonl.gz",
    "train/qamr_test.jsonl.gz",
    "train/squadshifts_amazon.jsonl.gz",
    "train/squadshifts_reddit.jsonl.gz",
    "train/timeqa_human_easy.jsonl.gz",
    "train/fairytaleqa_train.jsonl.gz",
)
"""Files of people's questions; those that are absent are left out."""

_HELD_OUT_SHARE = 100
"""One article in this many is held out of training and used by the probe only."""


@dataclass(frozen=True)
class Article:
    """A titled text."""

    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question whose first answer is a span of its passage."""

    text: str
    answers: tuple[str, ...]
    relation: str
    table: str = ""
    """Name of a table whose articles are of the same kind as the one asked about; empty where there is none."""


@dataclass(frozen=True)
class ReaderData:
    """Everything a training run samples from."""

    articles: dict[str, Article]
    """By url; none asked about in ``dev/``, none held out, none with the same text as one of those."""
    questions: dict[str, list[Question]]
    """By url of the article; the urls are those of ``articles``."""
    tables: dict[str, list[str]]
    """Urls of articles of one kind, only urls of ``articles``, at least two."""
    people: list[tuple[Article, list[Question]]]
    """Paragraphs with what people asked about them."""
    held_out: list[tuple[Article, list[Question]]] = field(default_factory=list)
    """Articles kept for the probe, with their questions."""


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def dev_urls(data_dir: Path) -> set[str]:
    """Urls of the articles that the development questions ask about."""
    path = data_dir / DEV_QUESTIONS
    return {row["url"] for row in read_jsonl(path)} if path.exists() else set()


def read_articles(data_dir: Path) -> dict[str, Article]:
    """All intros by url, those of ``dev/`` included."""
    return {row["url"]: Article(row["title"], row["text"]) for row in read_jsonl(data_dir / INTROS)}


def read_tables(data_dir: Path) -> dict[str, list[str]]:
    """Urls of articles of the same kind, by the name of the table they come from."""
    with gzip.open(data_dir / TABLES, "rt", encoding="utf-8") as source:
        tables: dict[str, list[str]] = json.load(source)
    return tables


def load_reader_data(data_dir: Path) -> ReaderData:
    """Read the training files.

    Raises ``FileNotFoundError`` naming the file where one that is needed is absent.
    """
    for name in (INTROS, PATTERN_QUESTIONS, TABLES):
        if not (data_dir / name).is_file():
            raise FileNotFoundError(f"training data: {data_dir / name} is missing")
    everything = read_articles(data_dir)
    asked = dev_urls(data_dir)
    # The same article can stand under two urls (a redirect), so texts are compared as well.
    asked_texts = {everything[url].text for url in asked if url in everything}
    held_out_urls = {url for url in everything if zlib.crc32(url.encode()) % _HELD_OUT_SHARE == 0}
    held_out_texts = {everything[url].text for url in held_out_urls}
    held_out_urls = {u for u in held_out_urls if u not in asked and everything[u].text not in asked_texts}
    articles = {
        url: article
        for url, article in everything.items()
        if url not in asked and article.text not in asked_texts and article.text not in held_out_texts
    }
    questions: dict[str, list[Question]] = {}
    held_out: dict[str, list[Question]] = {}
    for row in read_jsonl(data_dir / PATTERN_QUESTIONS):
        question = Question(row["question"], tuple(row["answers"]), row["rel"], row.get("distractor_table") or "")
        if row["url"] in articles:
            questions.setdefault(row["url"], []).append(question)
        elif row["url"] in held_out_urls:
            held_out.setdefault(row["url"], []).append(question)
    tables = {name: [url for url in urls if url in articles] for name, urls in read_tables(data_dir).items()}
    return ReaderData(
        articles=articles,
        questions=questions,
        tables={name: urls for name, urls in tables.items() if len(urls) > 1},
        people=_read_people(data_dir),
        held_out=[(everything[url], found) for url, found in held_out.items()],
    )


def _read_people(data_dir: Path) -> list[tuple[Article, list[Question]]]:
    """People's questions grouped by the paragraph that answers them."""
    grouped: dict[Article, list[Question]] = {}
    for name in PEOPLE_QUESTIONS:
        path = data_dir / name
        if not path.exists():
            continue
        for row in read_jsonl(path):
            gold = next((p for p in row["passages"] if p.get("gold")), None)
            # An answer that is no span of the paragraph cannot be learned by reading it.
            spans = [answer for answer in row["answers"] if gold and answer and answer in gold["text"]]
            if gold is None or not spans:
                continue
            shortest = min(spans, key=len)
            article = Article(gold["title"], " ".join(gold["text"].split()))
            if shortest in article.text:
                grouped.setdefault(article, []).append(Question(row["question"], (shortest,), "people"))
    return list(grouped.items())
