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


def test_two_files_with_one_id_are_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    """Row A4."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(name)
    for paths in (["one", "two"], ["one/README.md", "two/README.md"], ["one", "two/README.md"]):
        with pytest.raises(InvalidRequestError, match=r"one/README\.md and .*two/README\.md would both"):
            list(find_sources([tmp_path / path for path in paths]))
    assert [source.document_id for source in find_sources([tmp_path])] == ["one/README.md", "two/README.md"]


def test_a_file_that_is_named_twice_goes_in_once(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    assert [source.document_id for source in find_sources([tmp_path, tmp_path / "a.md"])] == ["a.md"]


def test_jsonl_files_may_have_one_name(tmp_path: Path) -> None:
    """Their documents have ids of their own."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("")
    assert len(list(find_sources([tmp_path / "one", tmp_path / "two"]))) == 2


def test_names_that_differ_only_in_their_encoding_are_one_id(tmp_path: Path) -> None:
    """Rows A4 and C4."""
    for name in ("ü.md", "u\u0308.md"):
        (tmp_path / name).write_text(name)
    with pytest.raises(InvalidRequestError, match="would both"):
        list(find_sources([tmp_path]))
