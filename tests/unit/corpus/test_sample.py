"""The shipped almanac and its questions: what they promise."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from blockrag.corpus.sample import Article, Question, articles_path, load_articles, load_questions

WORDS_PER_PASSAGE = 85
"""What 128 tokens hold at most; names and numbers hold less, so the count of passages is a lower bound."""


@pytest.fixture(scope="module")
def articles() -> dict[str, Article]:
    return {article.id: article for article in load_articles()}


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return load_questions()


def sentences(article: Article) -> list[str]:
    body = [line for line in article.text.splitlines() if line and not line.startswith("#")]
    return [text for line in body for text in re.split(r"(?<=[a-z0-9)])\. (?=[A-Z])", line)]


def test_size(articles: dict[str, Article]) -> None:
    words = sum(len(article.text.split()) for article in articles.values())
    assert len(articles) >= 250
    assert words / WORDS_PER_PASSAGE >= 2000
    assert len(articles_path().read_bytes()) < 1_500_000


def test_text_is_clean(articles: dict[str, Article]) -> None:
    unwanted = re.compile(r"<|>|&\w+;|\bNA\b|[{}\[\]~*_|]|  |[,;:]\s*[,;:.]|\.\.|\(\)|\best\.|\bnone\b|\snote:")
    for article in articles.values():
        found = unwanted.search(article.text)
        assert found is None, f"{article.id}: {article.text[max(0, found.start() - 40) : found.end() + 40]!r}"
        assert article.text.count("(") == article.text.count(")"), article.id


def test_sentences_stand_alone(articles: dict[str, Article]) -> None:
    for article in articles.values():
        name = article.title.removeprefix("The ")
        for sentence in sentences(article):
            assert name in sentence, f"{article.id}: {sentence}"
            assert len(sentence.split()) < WORDS_PER_PASSAGE


def test_paragraphs_end_sentences(articles: dict[str, Article]) -> None:
    for article in articles.values():
        for line in article.text.splitlines():
            assert not line or line.startswith("## ") or line.endswith("."), f"{article.id}: {line}"


def test_questions_are_many_and_varied(questions: list[Question]) -> None:
    relations = Counter(question.relation for question in questions)
    assert len(questions) == len({question.id for question in questions}) == 300
    assert len({question.question for question in questions}) == 300
    assert len(relations) >= 10 and max(relations.values()) <= 30
    assert len({question.article for question in questions}) >= 200


def test_answers_stand_in_their_article(articles: dict[str, Article], questions: list[Question]) -> None:
    for question in questions:
        text = articles[question.article].text
        assert question.answers
        for answer in question.answers:
            assert answer in text, f"{question.id}: {answer}"
            assert answer.strip() == answer != ""


def test_answers_are_not_given_away(questions: list[Question]) -> None:
    given_away = [question.id for question in questions if question.answers[0].lower() in question.question.lower()]
    assert len(given_away) <= 3, given_away
