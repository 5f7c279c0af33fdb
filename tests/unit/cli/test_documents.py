from pathlib import Path

import pytest

from blockrag.cli.documents import find_sources
from blockrag.errors import InvalidRequestError


def test_directories_are_searched_and_ids_are_paths_below_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.MD", "deep/c.pdf", "skipped.png", "deep/d.jsonl"):
        (tmp_path / name).write_text("text")
    assert [source.document_id for source in find_sources([tmp_path])] == [
        "a.MD",
        "b.txt",
        "deep/c.pdf",
        "deep/d.jsonl",
    ]


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    file = tmp_path / "notes.log"
    file.write_text("text")
    assert [(source.document_id, source.path) for source in find_sources([file])] == [("notes.log", file)]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="absent"):
        list(find_sources([tmp_path / "absent"]))
