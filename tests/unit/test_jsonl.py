from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from blockrag.errors import SetupError
from blockrag.jsonl import read_objects


def test_objects_come_with_their_place_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n   \n{"b": "ü"}\n', encoding="utf-8")

    assert list(read_objects(path)) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"b": "ü"})]


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    """As Windows' programs write, and as ingestion reads them."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')

    assert list(read_objects(path)) == [(f"{path}:1", {"a": 1})]


def test_compressed_files_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))

    assert [values for _, values in read_objects(path)] == [{"a": 1}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "must be a JSON object"),
        ('"a"', "must be a JSON object"),
    ],
)
def test_what_is_no_object_is_named_by_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n", encoding="utf-8")

    with pytest.raises(SetupError, match=rf"a\.jsonl:2: {problem}"):
        list(read_objects(path))


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b'{"a": "\xe4"}'])
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)

    with pytest.raises(SetupError, match=r"a\.jsonl: "):
        list(read_objects(path))


def test_a_damaged_archive_and_an_absent_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:30])

    with pytest.raises(SetupError, match=r"a\.jsonl\.gz: "):
        list(read_objects(path))
    with pytest.raises(SetupError, match="No such file"):
        list(read_objects(tmp_path / "absent.jsonl"))
