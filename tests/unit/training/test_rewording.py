import re
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from blockrag.training.cloze import FUNCTION_WORDS, answer_spans
from blockrag.training.mixture import Mixture
from blockrag.training.rewording import SentenceAsker, reworded_question

SENTENCE = "In 1927 she sold 4,200 silver shares to Anna Morla in Port Verdal, which upset the local fishermen."
RELATED = {"shares": ("stocks", "bonds"), "silver": ("silvery",), "sold": ("traded",)}


def _span(text: str) -> re.Match[str]:
    return next(span for span in answer_spans(SENTENCE) if span[0] == text)


def _questions(span: str, related: dict[str, tuple[str, ...]] | None = None) -> list[str]:
    asked = (reworded_question(SENTENCE, _span(span), "Berta", related or {}, Random(seed)) for seed in range(300))
    return [question.text for question in asked if question is not None]


def test_a_question_has_some_of_the_sentence_in_several_orders() -> None:
    questions = _questions("1927")
    assert len(set(questions)) > 200
    known = {word.lower() for word in re.findall(r"[\w,]*\w", SENTENCE)} | {"when", "what", "which", "year", "berta"}
    helpers = {"did", "was", "were", "is", "does", "are", "in", "of", "for"}
    for question in questions:
        words = {word.lower() for word in re.findall(r"[\w,]*\w", question.replace("'s", ""))}
        assert words <= known | helpers
        assert len(words & known - FUNCTION_WORDS) >= 2
        assert "1927" not in question
        assert question.endswith("?")
    assert any("Berta" in question for question in questions), "a pronoun becomes what the text is about"
    assert any(question.startswith(("When", "What year", "Which year")) for question in questions)
    assert any(question.index("shares") > question.index("sold") for question in questions if "sold" in question and
               "shares" in question)  # fmt: skip
    assert any(question.index("shares") < question.index("sold") for question in questions if "sold" in question and
               "shares" in question)  # fmt: skip


def test_words_are_replaced_by_related_ones() -> None:
    reworded, plain = " ".join(_questions("1927", RELATED)), " ".join(_questions("1927"))
    for others in RELATED.values():
        for other in others:
            assert other in reworded
            assert other not in plain


def test_what_a_number_counts_is_asked_for() -> None:
    questions = [question for question in _questions("4,200") if question.lower().count("how many")]
    assert questions
    assert all("how many silver" in question.lower() for question in questions)
    assert not any(question.lower().count("silver") > 1 for question in questions)


@given(st.text(max_size=300), st.integers(0, 50))
def test_any_text_gives_answers_that_stand_in_it_or_nothing(text: str, seed: int) -> None:
    found = SentenceAsker(Mixture(cloze=3), RELATED).questions("title", text, Random(seed))
    assert len(found) <= 3
    assert len({question.answers for question in found}) == len(found)
    for question in found:
        assert question.answers[0] in text
        assert question.text


def test_the_mixture_says_how_many_and_of_which_kind() -> None:
    text = " ".join(SENTENCE.replace("1927", str(1900 + number)) for number in range(20))

    def kinds(mixture: Mixture) -> list[str]:
        asker = SentenceAsker(mixture, {})
        return [q.relation for seed in range(200) for q in asker.questions("Berta", text, Random(seed))]

    assert kinds(Mixture(cloze=0)) == []
    assert set(kinds(Mixture(cloze=1, reworded=1))) == {"reworded"}
    assert set(kinds(Mixture(cloze=1, reworded=0))) == {"cloze", "gap"}
    assert 1.3 < len(kinds(Mixture(cloze=1.5, reworded=0))) / 200 <= 1.5 + 0.1
