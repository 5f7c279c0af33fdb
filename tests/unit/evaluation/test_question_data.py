from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import SetupError
from blockrag.evaluation.question_data import load_questions
from tests.unit.evaluation.question_files import write_jsonl, write_key_values, write_patterns, write_rows

ROW: dict[str, Any] = {"question": "Who?", "answers": ["He"], "passages": [{"title": "T", "text": "He.", "gold": True}]}


def test_question_rows(tmp_path: Path) -> None:
    rows = [
        ROW,
        {
            "id": "second",
            "question": "Who\nelse?",
            "answers": ["She", " "],
            "passages": [
                {"title": "U", "text": "Nobody\n at all.", "gold": False},
                {"title": "T", "text": "He.", "gold": False},
                {"title": "V", "text": "She.", "gold": True},
                {"title": "V", "text": "She.", "gold": True},
            ],
        },
    ]
    file = write_jsonl(tmp_path / "some.jsonl", rows)
    data = load_questions(file)
    by_id = {question.id: question for question in data.questions}
    second = by_id["second"]
    texts = [passage.text for passage in data.passages]
    assert (data.name, data.kind, set(by_id)) == ("some", "rows", {"1", "second"})
    assert (second.text, second.answers) == ("Who else?", ("She",))
    assert [texts[number] for number in second.gold] == ["She."]
    assert [texts[number] for number in second.same_kind] == ["Nobody at all.", "He."]
    assert second.same_kind[1] == by_id["1"].gold[0]
    assert data.sha256 == {"some.jsonl": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_pattern_questions(tmp_path: Path) -> None:
    data = load_questions(write_patterns(tmp_path))
    assert (data.name, data.kind, len(data.questions)) == ("wiki_pattern_qa", "pattern", 8)
    # The redirect's intro is the same passage.
    assert len(data.passages) == 12
    question = data.questions[0]
    assert {data.passages[number].title for number in question.same_kind} == {f"Town {n}" for n in range(8)}
    assert set(data.sha256) == {"wiki_pattern_qa.jsonl.gz", "wiki_intros.jsonl.gz", "wiki_table_to_urls.json.gz"}
    assert data.searched([question]) == sorted({*question.gold, *question.same_kind})


def test_key_value_records_are_passages(tmp_path: Path) -> None:
    data = load_questions(write_key_values(tmp_path / "kv.jsonl.gz"))
    question = next(question for question in data.questions if question.id == "2")
    assert (question.text, question.answers) == ("What is the value of key11?", ("value11",))
    assert data.passages[question.gold[0]].text == '"key11": "value11".'
    assert len(question.same_kind) == 7


def test_the_seed_shuffles(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    orders = [[question.id for question in load_questions(file, seed).questions] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "no questions"),
        ([{"something": 1}], ":1: neither"),
        ([ROW, {**ROW, "question": " "}], ":2: question must be a text"),
        ([ROW, {**ROW, "answers": "He"}], ":2: answers must be a list"),
        ([ROW, {**ROW, "passages": []}], ":2: passages must be a list"),
        ([ROW, {**ROW, "passages": [{"title": "T"}]}], ":2: a passage must have"),
        ([{"ordered_kv_records": [["a"]], "key": "a", "value": "b"}], ":1: ordered_kv_records"),
        ([{"ordered_kv_records": [["a", "b"]], "key": "a", "value": "c"}], ":1: key and value must be one"),
        ([{"url": "/x", "question": "Who?", "answers": []}], "need wiki_intros"),
    ],
)
def test_malformed_rows_are_named_by_line(tmp_path: Path, rows: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(SetupError, match=problem):
        load_questions(write_jsonl(tmp_path / "bad.jsonl", rows))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"absent\.jsonl: No such file"):
        load_questions(tmp_path / "absent.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n{"question\n')
    with pytest.raises(SetupError, match="neither"):
        load_questions(tmp_path / "bad.jsonl")
    (tmp_path / "half.jsonl").write_text(write_rows(tmp_path / "rows.jsonl").read_text() + '{"question"\n')
    with pytest.raises(SetupError, match=r"half\.jsonl:12: "):
        load_questions(tmp_path / "half.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(SetupError, match=":1: must be a JSON object"):
        load_questions(tmp_path / "list.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": 1}' * 100)[:40])
    with pytest.raises(SetupError, match=r"cut\.jsonl\.gz"):
        load_questions(tmp_path / "cut.jsonl.gz")
    with pytest.raises(SetupError, match="No such file"):
        load_questions(tmp_path)


def test_a_pattern_question_about_an_unknown_article_is_named(tmp_path: Path) -> None:
    folder = write_patterns(tmp_path)
    rows = [{"url": "/missing", "question": "Who?", "answers": ["He"]}]
    write_jsonl(folder / "dev/wiki_pattern_qa.jsonl.gz", rows)
    with pytest.raises(SetupError, match=":1: no intro with the url '/missing'"):
        load_questions(folder)
