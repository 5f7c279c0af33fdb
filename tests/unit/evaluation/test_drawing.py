from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.errors import SetupError
from blockrag.evaluation.drawing import Draw, PieceMaker, draw_questions
from blockrag.evaluation.experiment_options import Distractors
from blockrag.evaluation.question_data import QuestionData, load_questions
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer
from tests.unit.evaluation.question_files import town, write_jsonl, write_key_values, write_patterns, write_rows

TOKENIZER = make_tiny_tokenizer()
PASSAGE_TOKENS = 200


def _maker() -> PieceMaker:
    return PieceMaker(TEST_TEMPLATE, TOKENIZER, PASSAGE_TOKENS)


def _draw(
    data: QuestionData, kind: Distractors, most: int = 5, absent: int = 0, count: int = 100, seed: int = 0
) -> Draw:
    return draw_questions(data, _maker(), count=100, most_passages=most, absent_passages=absent, distractors=kind)


def test_passages_are_cut_as_serving_cuts_them(tmp_path: Path) -> None:
    data = load_questions(write_rows(tmp_path / "rows.jsonl"))
    pieces = _maker().pieces(data.passages[0])
    assert len(pieces) > 1
    assert " ".join(piece.text for piece in pieces) == data.passages[0].text
    assert all(len(TEST_TEMPLATE.passage_ids(TOKENIZER, one.title, one.text)) <= PASSAGE_TOKENS for one in pieces)


@pytest.mark.parametrize("kind", ["same", "bm25", "random"])
def test_every_kind_of_distractor(tmp_path: Path, kind: Distractors) -> None:
    data = load_questions(write_patterns(tmp_path))
    draw = _draw(data, kind, absent=5)
    assert draw == _draw(data, kind, absent=5)
    assert (len(draw.questions), draw.without_gold) == (8, 0)
    for question in draw.questions:
        (answer,) = question.source.answers
        assert question.holds_answer and answer in question.gold.text
        shown = question.passages(5)
        assert len(set(shown)) == 5 and shown[int(5 * question.place)] == question.gold
        # The redirect's pieces hold the answer as well and are never shown.
        assert sum(answer in piece.text for piece in shown) == 1
        assert len(set(question.absent)) == 5
        assert all(piece.title != question.gold.title for piece in question.absent)
        assert question.passages(3, 0) == (question.gold, *question.distractors[:2])
        assert question.passages(3, 2) == (*question.distractors[:2], question.gold)
        assert question.passages(1) == (question.gold,)
    kinds = {piece.title for question in draw.questions for piece in question.distractors}
    assert kinds <= {f"Town {n}" for n in range(8 if kind == "same" else 12)}


def test_hard_distractors_rank_before_others(tmp_path: Path) -> None:
    data = load_questions(write_rows(tmp_path / "rows.jsonl"))
    draw = _draw(data, "bm25", most=3)
    for question in draw.questions:
        # The question names its town and speaks of people, as only the last piece of another town does.
        assert all(piece.title == question.gold.title or "people" in piece.text for piece in question.distractors)
    others = _draw(data, "random", most=3)
    assert [one.source for one in others.questions] == [one.source for one in draw.questions]


def test_same_kind_takes_the_piece_nearest_to_the_question(tmp_path: Path) -> None:
    draw = _draw(load_questions(write_patterns(tmp_path)), "same", most=4)
    for question in draw.questions:
        word = "people" if question.source.group == "population" else "founded"
        others = [piece for piece in question.distractors if piece.title != question.gold.title]
        assert others and all(word in piece.text for piece in others)


def test_key_values_have_the_other_records_of_their_row(tmp_path: Path) -> None:
    (first, second) = _draw(load_questions(write_key_values(tmp_path / "kv.jsonl")), "same", most=6).questions
    for question in (first, second):
        own = question.source.text.split("key")[1][0]
        assert all(f'"key{own}' in piece.text for piece in question.passages(6))


def test_questions_without_gold_are_passed_over_and_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "answers": [], "passages": [{"title": "T", "text": "He.", "gold": True}]},
        {"question": "What?", "answers": ["it"], "passages": [{"title": "T", "text": "He.", "gold": False}]},
        {"question": "When?", "answers": ["now"], "passages": [{"title": "U", "text": "It is now.", "gold": True}]},
    ]
    data = load_questions(write_jsonl(tmp_path / "some.jsonl", rows), seed=0)
    draw = _draw(data, "random", most=1)
    assert [question.source.text for question in draw.questions] == ["When?"]
    assert draw.without_gold <= 2
    with pytest.raises(SetupError, match="no question has both an answer and a gold passage"):
        _draw(load_questions(write_jsonl(tmp_path / "none.jsonl", rows[:2])), "random")


def test_an_answer_in_other_words_takes_the_nearest_piece(tmp_path: Path) -> None:
    passage = {"title": "Town 1", "text": town(1), "gold": True}
    row = {"question": "Which baron founded Town 1?", "answers": ["a noble baron of old"], "passages": [passage]}
    other = {**row, "passages": [{"title": "Town 2", "text": town(2), "gold": True}]}
    data = load_questions(write_jsonl(tmp_path / "free.jsonl", [row, other]))
    question = next(one for one in _draw(data, "random", most=2).questions if "Number1" in one.gold.text)
    assert not question.holds_answer
    assert "founded by Baron Number1" in question.gold.text


def test_more_passages_than_there_are(tmp_path: Path) -> None:
    data = load_questions(write_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(SetupError, match="too few passages to show 60"):
        _draw(data, "random", most=60)
