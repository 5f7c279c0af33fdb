import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.training.cloze import answer_spans, cloze_question, is_date, pick_span, question_word
from blockrag.training.data import Question
from blockrag.training.paraphrases import paraphrase

SENTENCE = "In 1927, Anna Morla of Port Verdal sold 4,200 shares for $3.5 on 4 May 1931, which upset local fishermen."


def _span(text: str) -> re.Match[str]:
    return next(span for span in answer_spans(SENTENCE) if span[0] == text)


def test_spans_are_names_dates_numbers_and_content_words() -> None:
    spans = {span[0] for span in answer_spans(SENTENCE)}
    assert {"1927", "Anna Morla of Port Verdal", "4,200", "$3.5", "4 May 1931", "upset local fishermen"} <= spans
    assert not spans & {"In", "which", "for", "4"}


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ("1927", {"when", "what year", "which year"}),
        ("4,200", {"how many", "what number"}),
        ("$3.5", {"how much", "what"}),
        ("4 May 1931", {"when", "what date"}),
        ("upset local fishermen", {"what"}),
    ],
)
def test_question_words_follow_the_span(span: str, words: set[str]) -> None:
    found = {question_word(SENTENCE, _span(span), Random(seed)) for seed in range(40)}
    assert found == words


def test_the_answer_is_not_in_the_question() -> None:
    for seed in range(200):
        random = Random(seed)
        span = random.choice(answer_spans(SENTENCE))
        question = cloze_question(SENTENCE, span, "Morla", random)
        assert question.answers == (span[0],)
        assert question.relation == ("gap" if "___" in question.text else "cloze")
        if question.relation == "cloze":
            assert question.text.endswith("?")
        if span[0] != "4,200":  # a digit of it may stand elsewhere
            assert span[0] not in question.text


@given(st.text(max_size=300), st.integers(0, 50))
def test_any_text_gives_a_span_of_it_or_nothing(text: str, seed: int) -> None:
    picked = pick_span("title", text, Random(seed))
    if picked is not None:
        sentence, span = picked
        assert sentence in text
        assert sentence[span.start() : span.end()] == span[0]


def test_years_and_dates_are_dates() -> None:
    assert is_date("1931")
    assert is_date("4 May 1931")
    assert not is_date("4,200")
    assert not is_date("in 1931")


def test_paraphrases_keep_title_and_answer() -> None:
    question = Question("What is the population of Doha?", ("956,460",), "population", "table")
    wordings = {paraphrase(question, "Doha", Random(seed)).text for seed in range(60)}
    assert len(wordings) > 3
    assert all("Doha" in wording for wording in wordings)
    assert "How many people live in Doha?" in wordings
    other = Question("What is the motto of Doha?", ("x",), "attribute")
    assert paraphrase(other, "Doha", Random(0)) is other
