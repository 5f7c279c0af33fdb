"""The shipped almanac and its questions: what they promise, and that the generator wrote them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from blockrag.corpus import generate
from blockrag.corpus.almanac.articles import write_article, write_articles
from blockrag.corpus.almanac.profile import make_profile, read_profiles
from blockrag.corpus.almanac.questions import QUOTAS, WORDINGS
from blockrag.corpus.sample import Article, Question, articles_path, load_articles, load_questions

FACTS = Path(__file__).parents[2] / "data" / "factbook.tar.gz"
"""A few countries of the archive that the almanac was written from."""
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
    assert len(questions) == len({question.id for question in questions}) == sum(QUOTAS.values()) == 300
    assert len({question.question for question in questions}) == 300
    assert relations == QUOTAS
    assert len(relations) >= 10 and max(relations.values()) <= 30
    assert len({question.article for question in questions}) >= 200
    assert set(QUOTAS) == set(WORDINGS)


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


def test_a_broken_question_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "1", "question": "?", "answers": ["a"], "article": "x", "relation": "r"}\n{"id": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        load_questions(path)


def test_articles_do_not_depend_on_order_or_time() -> None:
    facts = {
        "Geography": {
            "Location": {"text": "Oceania, island in the South Pacific Ocean, east of Tonga"},
            "Area": {"total ": {"text": "260 sq km"}},
        },
        "People and Society": {"Population": {"total": {"text": "2,000 (2022 est.)"}}},
        "Government": {
            "Country name": {"conventional short form": {"text": "Exampleland"}},
            "Capital": {"name": {"text": "Alofi <em>(city)</em>"}},
            "National holiday": {"text": "NA"},
        },
    }
    profile = make_profile("zz", "australia-oceania", facts)
    assert profile is not None
    article = write_article(profile)
    assert article == write_article(profile)
    assert article.metadata == {"region": "Oceania", "code": "zz"}
    for fact in (
        "is an island country in Oceania",
        "in the South Pacific Ocean, east of Tonga",
        "Alofi",
        "260 square kilometres",
        "2,000 in 2022",
    ):
        assert fact in article.text
    assert "holiday" not in article.text
    assert (
        write_article(profile, seed=1).text.split() != []
        and len({write_article(profile, seed).text for seed in range(8)}) > 1
    )


def test_a_file_without_facts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "facts.tar.gz"
    broken.write_bytes(b"no archive")
    assert generate.main(["--facts", str(broken), "--out", str(tmp_path / "out")]) == 1
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_generator_wrote_what_ships(articles: dict[str, Article], questions: list[Question]) -> None:
    written = list(write_articles(FACTS))

    assert len(written) >= 6
    for article in written:
        assert asdict(articles[article.id]) == article.to_dict()
        said = {(statement.relation, statement.answers) for statement in article.statements}
        asked = {(question.relation, question.answers) for question in questions if question.article == article.id}
        assert asked <= said


def test_too_few_facts_for_the_questions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--facts", str(FACTS), "--out", str(tmp_path / "out")]) == 1
    assert "statements for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_basic_fact_has_its_sentence(articles: dict[str, Article]) -> None:
    for profile in read_profiles(FACTS):
        text = articles[profile.country.slug].text
        area = profile.text("Geography", "Area", "total")
        population = profile.text("People and Society", "Population", "total")
        capital = profile.text("Government", "Capital", "name")
        if area:
            assert re.search(r"[\d,.]+ square kilometres", text), profile.country.title
        if population:
            assert re.search(r"[Pp]opulation|inhabitants", text.split("##")[0]), profile.country.title
        if capital and not capital.startswith(("no ", "administered")):
            assert " capital of " in text, profile.country.title
