"""The training files: what is read from a ``--data`` directory, and what is kept away from training.

The directory has two folders. ``train/`` holds titled article intros, questions made from them by patterns, tables of
articles of the same kind, questions asked by people on paragraphs, and long texts. ``dev/`` is read for one purpose: to
know what must not be trained on.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockrag.training.overlap import OverlapFilter

INTROS = "train/wiki_intros.jsonl.gz"
PATTERN_QUESTIONS = "train/wiki_pattern_qa.jsonl.gz"
TABLES = "train/wiki_table_to_urls.json.gz"
DEV_QUESTIONS = "dev/wiki_pattern_qa.jsonl.gz"
PEOPLE_QUESTIONS = {
    "train/squadshifts_amazon.jsonl.gz": 3.0,
    "train/squadshifts_reddit.jsonl.gz": 3.0,
    "train/fairytaleqa_train.jsonl.gz": 2.0,
    "train/qamr_dev.jsonl.gz": 1.5,
    "train/qamr_test.jsonl.gz": 1.5,
    "train/timeqa_human_easy.jsonl.gz": 1.0,
    "train/timeqa_human_hard.jsonl.gz": 0.5,
    "train/policyqa_dev.jsonl.gz": 0.4,
    "train/policyqa_test.jsonl.gz": 0.4,
    "train/friendsqa_dev.jsonl.gz": 0.3,
    "train/friendsqa_tst.jsonl.gz": 0.3,
}
"""Files of people's questions and how often each is drawn from; those that are absent are left out."""
LONG_TEXTS = {
    "train/wikitablequestions_wiki_pages.jsonl.gz": 4.0,
    "train/openstax_philschatz.jsonl.gz": 2.0,
    "train/books.jsonl.gz": 2.0,
}
"""Files of long texts and how often each is drawn from; those that are absent are left out."""
DEV_PASSAGES = ("dev/xquad_en.jsonl.gz", "dev/qed_dev_nq.jsonl.gz", "dev/fairytaleqa_val.jsonl.gz")

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
class Paragraph:
    """A paragraph that people asked about, or one that stood beside it."""

    article: Article
    questions: tuple[Question, ...]
    family: str
    """What it shares with the paragraphs that are hardest to tell from it: a story, an article, a site."""


@dataclass(frozen=True)
class Document:
    """A long text."""

    title: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class ReaderData:
    """Everything a training run samples from."""

    articles: dict[str, Article]
    """By url; none asked about in ``dev/``, none held out, none with the same text as one of those."""
    questions: dict[str, list[Question]]
    """By url of the article; the urls are those of ``articles``."""
    tables: dict[str, list[str]]
    """Urls of articles of one kind, only urls of ``articles``, at least two."""
    people: dict[str, list[Paragraph]] = field(default_factory=dict)
    """By file: paragraphs with what people asked about them."""
    documents: dict[str, list[Document]] = field(default_factory=dict)
    """By file: long texts."""
    held_out: list[tuple[Article, list[Question]]] = field(default_factory=list)
    """Articles kept for the probe, with their questions."""
    held_out_people: list[Paragraph] = field(default_factory=list)
    """Paragraphs kept for the probe, each with a question."""


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
    evaluated = OverlapFilter(_dev_texts(data_dir))
    articles = {
        url: article
        for url, article in everything.items()
        if url not in asked
        and article.text not in asked_texts
        and article.text not in held_out_texts
        and not evaluated(article.text)
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
    people = {name: _read_people(data_dir / name, evaluated) for name in PEOPLE_QUESTIONS}
    return ReaderData(
        articles=articles,
        questions=questions,
        tables={name: urls for name, urls in tables.items() if len(urls) > 1},
        people={name: [p for p in found if not _is_held_out(p)] for name, found in people.items() if found},
        documents=_read_documents(data_dir, evaluated, {everything[url].title for url in asked if url in everything}),
        held_out=[(everything[url], found) for url, found in held_out.items()],
        held_out_people=[p for found in people.values() for p in found if p.questions and _is_held_out(p)],
    )


def _dev_texts(data_dir: Path) -> Iterator[str]:
    for name in DEV_PASSAGES:
        if (data_dir / name).exists():
            yield from {passage["text"] for row in read_jsonl(data_dir / name) for passage in row["passages"]}


def _is_held_out(paragraph: Paragraph) -> bool:
    return zlib.crc32(paragraph.article.text.encode()) % _HELD_OUT_SHARE == 0


def _read_people(path: Path, evaluated: OverlapFilter) -> list[Paragraph]:
    """People's questions grouped by the paragraph that answers them, and the paragraphs beside those."""
    if not path.exists():
        return []
    grouped: dict[Article, list[Question]] = {}
    for row in read_jsonl(path):
        for passage in row["passages"]:
            article = Article(passage["title"], " ".join(passage["text"].split()))
            questions = grouped.setdefault(article, [])
            # An answer that is no span of the paragraph cannot be learned by reading it.
            spans = [answer for answer in row["answers"] if answer and answer in article.text]
            if passage.get("gold") and spans:
                questions.append(Question(row["question"], (min(spans, key=len),), "people"))
    return [
        Paragraph(article, tuple(dict.fromkeys(questions)), article.title)
        for article, questions in grouped.items()
        if not evaluated(article.text)
    ]


def _read_documents(data_dir: Path, evaluated: OverlapFilter, asked_titles: set[str]) -> dict[str, list[Document]]:
    """Long texts, without those about what ``dev/`` asks about and without paragraphs that stand in it."""
    documents: dict[str, list[Document]] = {}
    for name in LONG_TEXTS:
        path = data_dir / name
        if not path.exists():
            continue
        for row in read_jsonl(path):
            if row["title"] in asked_titles:
                continue
            parts = row["paragraphs"] if "paragraphs" in row else row["text"].split("\n\n")
            cleaned = (" ".join(part.split()) for part in parts)
            kept = tuple(part for part in cleaned if len(part) > 60 and part[0] != "#" and not evaluated(part))
            if kept:
                title = row["title"].rpartition("/")[2]
                documents.setdefault(name, []).append(Document(title, kept))
    return documents
