"""BM25 weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.bm25 import Bm25, Bm25Scorer
from blockrag.languages import LANGUAGES

CASES = Path(__file__).resolve().parents[1] / "data" / "cases"


def shared(language: str, passage: str, question: str) -> tuple[int, int]:
    """Terms of the question that the passage has, and all of them."""
    bm25 = Bm25(language)
    terms = set(bm25.embed_query(question).indices)
    return len(terms & set(bm25.embed_passage("", passage).indices)), len(terms)


def test_a_chinese_question_finds_its_words() -> None:
    """Row C1: of the five pairs of 退款多久到账, 退款 and 到账 are in the passage."""
    passages = (CASES / "refunds-zh.txt").read_text(encoding="utf-8").split()
    assert [shared("english", passage, "退款多久到账") for passage in passages] == [(2, 5), (0, 5), (0, 5)]


@pytest.mark.parametrize(
    ("language", "passage", "question", "least"),
    [
        ("english", "雨天の場合は翌週の同じ曜日に延期となります。", "雨天延期", 2),
        ("none", "ค่าที่พักสำหรับการเดินทางบริษัทเป็นผู้จ่าย", "ค่าที่พัก", 7),
        ("english", "회의실은 이틀 전에 예약해야 합니다.", "회의실을 예약", 3),
        ("russian", "Расторжение договора возможно за тридцать дней.", "расторгнуть договоры", 1),
        ("german", "Die Prüfung der Geschäftsräume", "Prüfungen", 1),
        ("english", "ＡＢＣ部門の猫", "abc", 1),
        ("english", "ＡＢＣ部門の猫", "猫", 1),
    ],
)
def test_words_are_shared_in_other_scripts_and_inflections(
    language: str, passage: str, question: str, least: int
) -> None:
    """Row C1: Japanese, Thai, Korean with particles, Russian inflections."""
    assert shared(language, passage, question)[0] >= least


def test_russian_is_stemmed_only_in_a_russian_collection() -> None:
    assert shared("russian", "договора", "договоры") == (1, 1)
    assert shared("english", "договора", "договоры") == (0, 1)
    assert shared("none", "running", "run") == (0, 1)
    assert shared("none", "what is the", "the") == (1, 1)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_known_to_the_model(language: str) -> None:
    """Row C1: digits stand for pairs, so no stemmer may change them."""
    assert shared(language, "本公司的退款将在五个工作日内到账", "退款") == (1, 1)


def test_query_and_passage_share_stems_and_fold_accents() -> None:
    bm25 = Bm25()
    passage = bm25.embed_passage("Reykjavík", "Ships were sailing to the harbour.")

    assert set(bm25.embed_query("reykjavik sail harbours").indices) <= set(passage.indices)
    assert not set(bm25.embed_query("desert").indices) & set(passage.indices)


def test_stop_words_weigh_nothing() -> None:
    assert Bm25().embed_query("what is the of").indices == ()


def test_a_repeated_word_weighs_more_but_less_than_twice() -> None:
    once, twice = (Bm25().embed_passage("", text).values for text in ("salt harbour ship", "salt salt harbour ship"))

    assert max(once) < max(twice) < 2 * max(once)


def test_given_texts_are_scored_with_their_languages_stems_and_stop_words() -> None:
    german = [("", "Die Prüfung der Geschäftsräume."), ("", "Die Kosten für die Miete."), ("", "Wir heizen.")]
    question = "Wann sind die Prüfungen?"
    assert Bm25Scorer(german, "german").scores(question).argmax() == 0
    assert Bm25Scorer(german, "german").scores(question)[1:].tolist() == [0, 0], "die is a stop word"
    assert Bm25Scorer(german).scores(question)[1] > Bm25Scorer(german, "german").scores(question)[1]
    english = [("", "Ships were sailing."), ("", "The rain.")]
    assert (Bm25Scorer(english).scores("sail") == Bm25Scorer(english, "english").scores("sail")).all()
    assert Bm25Scorer(english, "none").scores("sail").tolist() == [0, 0]


def test_scores_are_the_sums_of_what_words_add() -> None:
    scorer = Bm25Scorer([("Oslo", "A harbour of ships."), ("Doha", "A harbour."), ("Bergen", "Rain.")])
    by_word = scorer.by_word("Ships in which harbour?")
    assert (by_word > 0).tolist() == [[True, True], [False, True], [False, False]]
    assert by_word[0, 0] > by_word[0, 1] > 0, "fewer texts have the word"
    assert scorer.scores("Ships in which harbour?").tolist() == by_word.sum(axis=1).tolist()
    assert scorer.by_word("of the").shape == (3, 0) and scorer.scores("of the").tolist() == [0, 0, 0]
