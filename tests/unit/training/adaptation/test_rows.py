from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.errors import SetupError
from blockrag.training.adaptation.samples import Passage, Row, _parse, read_rows
from tests.unit.training.adaptation.conftest import colour_rows, write_rows

GOOD = {"question": "Who?", "answers": ["Ann", "She"], "passages": [{"title": "T", "text": "Ann did.", "gold": True}]}


def test_a_row_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({**GOOD, "id": 7}) + "\n", encoding="utf-8")

    assert read_rows([path]) == [Row(f"{path}:2", "Who?", ("Ann", "She"), (Passage("T", "Ann did.", True),))]


def test_a_directory_is_read_file_by_file_also_compressed(tmp_path: Path) -> None:
    rows = colour_rows(5)
    write_rows(tmp_path / "b.jsonl", rows[:2])
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as target:
        target.writelines(json.dumps(row) + "\n" for row in rows[2:])
    (tmp_path / "notes.txt").write_text("not data", encoding="utf-8")

    read = read_rows([tmp_path])

    assert [row.question for row in read] == [row["question"] for row in rows[2:] + rows[:2]]


def test_title_and_gold_may_be_absent_and_a_question_unanswered(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "Q", "answers": [], "passages": [{"text": "t"}]}])

    assert read_rows([path])[0].passages == (Passage("", "t", False),)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": " "}, "question must be a text that is not empty"),
        ({"question": None}, "question must be a text"),
        ({"answers": []}, "no answer, though a passage is marked gold"),
        ({"answers": "Ann"}, "answers must be a list of texts"),
        ({"answers": ["Ann", ""]}, "answers must be a list of texts"),
        ({"passages": []}, "passages must be a list with at least one passage"),
        ({"passages": ["text"]}, r"passages\[0\]: must be a JSON object"),
        ({"passages": [{"text": "a"}, {"title": "b"}]}, r"passages\[1\]: text must be a text"),
        ({"passages": [{"text": "a", "gold": 1}]}, r"passages\[0\]: gold must be true or false"),
        ({"passages": [{"text": "a", "title": 1}]}, r"passages\[0\]: title must be a text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {**GOOD, **change}])

    with pytest.raises(SetupError, match=rf"rows\.jsonl:2: {problem}"):
        read_rows([path])


def test_a_row_without_the_key_answers(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{key: value for key, value in GOOD.items() if key != "answers"}])

    with pytest.raises(SetupError, match=r"rows\.jsonl:1: answers must be"):
        read_rows([path])


@pytest.mark.parametrize("content", ["{broken", '["a list"]', '"text"'])
def test_a_line_that_is_no_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(SetupError, match=r"rows\.jsonl:1: "):
        read_rows([path])


def test_nothing_to_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    folder = tmp_path / "folder"
    folder.mkdir()

    with pytest.raises(SetupError, match="no rows"):
        read_rows([empty])
    with pytest.raises(SetupError, match=r"no .jsonl or .jsonl.gz file"):
        read_rows([folder])
    with pytest.raises(SetupError, match="no such file or directory"):
        read_rows([tmp_path / "absent.jsonl"])


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode())[:20])

    with pytest.raises(SetupError, match=r"rows\.jsonl\.gz: "):
        read_rows([path])


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["question", "answers", "passages", "other"]), _JSON))
def test_any_object_is_a_row_or_refused_by_place(values: dict[str, Any]) -> None:
    try:
        row = _parse("file:9", values)
    except SetupError as error:
        assert str(error).startswith("file:9: ")
    else:
        assert row.passages and row.question
