from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.errors import SetupError
from blockrag.evaluation.drawing import DrawnQuestion, Piece, PieceMaker, draw_questions
from blockrag.evaluation.experiment import answer_values
from blockrag.evaluation.question_data import QuestionData, SourcePassage, SourceQuestion, load_questions
from blockrag.evaluation.question_pairs import in_pairs
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer
from tests.unit.evaluation.question_files import write_patterns, write_rows

PLACES = (SourcePassage("Doha", "Doha has 956,460 people."), SourcePassage("Oslo", "Oslo has 709,037 people."))


def _asked(number: int, text: str, *answers: str, group: str = "population") -> SourceQuestion:
    return SourceQuestion(str(number), text, answers, (number,), (0, 1), group)


def _data(*questions: SourceQuestion, passages: tuple[SourcePassage, ...] = PLACES) -> QuestionData:
    return QuestionData("places", "pattern", questions, passages)


DOHA = _asked(0, "What is the population of Doha?", "956,460")
OSLO = _asked(1, "What is the population of Oslo?", "709,037", "709037")


def test_two_questions_are_asked_as_one() -> None:
    (pair,) = in_pairs(_data(DOHA, OSLO)).questions
    assert pair.text == "What is the population of Doha, and what is the population of Oslo?"
    assert pair.answers == ("956,460 and 709,037", "956,460 and 709037")
    assert (pair.gold, pair.same_kind, pair.group, pair.parts) == ((0, 1), (0, 1), "population", (DOHA, OSLO))
    assert DOHA.parts == (DOHA,)
    told = in_pairs(_data(_asked(0, "Describe Doha F.C. briefly.", "956,460"), OSLO)).questions[0]
    assert told.text == "Describe Doha F.C. briefly, and what is the population of Oslo?"


def test_pairs_are_of_one_relation_and_need_both_passages() -> None:
    country = _asked(1, "Where is Oslo?", "Norway", group="located")
    alike = _asked(1, "How many people has Oslo?", "956,460")
    for other, passages in (
        (country, PLACES),
        (alike, (PLACES[0], SourcePassage("Oslo", "Oslo has 956,460 people, too."))),
        (OSLO, (SourcePassage("Doha", "Doha has 956,460 people, and Oslo has 709,037."), PLACES[1])),
        (DOHA, PLACES),
    ):
        with pytest.raises(SetupError, match="places: no two questions of one relation and one table"):
            in_pairs(_data(DOHA, other, passages=passages))


def test_pairs_are_drawn_by_the_seed_and_shown_with_both_passages(tmp_path: Path) -> None:
    data = load_questions(write_patterns(tmp_path))
    pairs = in_pairs(data, 0)
    assert (pairs.name, len(pairs.questions)) == ("wiki_pattern_qa, pairs", 4)
    assert pairs == in_pairs(data, 0)
    assert {tuple(in_pairs(data, seed).questions) for seed in range(4)} != {tuple(pairs.questions)}
    single = [part.id for pair in pairs.questions for part in pair.parts]
    assert sorted(single) == sorted(question.id for question in data.questions)
    maker = PieceMaker(TEST_TEMPLATE, make_tiny_tokenizer(), 200)
    draw = draw_questions(pairs, maker, count=9, most_passages=5, absent_passages=0, distractors="same")
    assert len(draw.questions) == 4
    for pair in draw.questions:
        assert pair.holds_answer
        for count in (2, 5):
            shown = pair.passages(count)
            assert len(set(shown)) == count and set(pair.golds) <= set(shown)
        for piece, part in zip(pair.golds, pair.source.parts, strict=True):
            holding = [shown for shown in pair.passages(5) if part.answers[0] in shown.text]
            assert holding == [piece]


def test_questions_that_do_not_pair(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="rows: no two questions"):
        in_pairs(load_questions(write_rows(tmp_path / "rows.jsonl")))


def test_half_of_a_pair_is_half_an_answer() -> None:
    (pair,) = in_pairs(_data(DOHA, OSLO)).questions
    pieces = [Piece(passage.title, passage.text) for passage in PLACES]
    asked = DrawnQuestion(pair, pieces[0], True, (), (), 0.0, (pieces[1],))
    outputs = ["956,460 and 709037", "It has 709,037.", "956,460", "none"]
    values = answer_values([asked] * 4, outputs)
    assert values["contained"].tolist() == [1.0, 0.5, 0.5, 0.0]
    assert values["f1"].tolist() == pytest.approx([1.0, 1 / 3, 0.5, 0.0])
    assert values["exact_match"].tolist() == [1.0, 0.0, 0.0, 0.0]
