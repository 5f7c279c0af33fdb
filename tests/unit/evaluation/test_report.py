from pathlib import Path

import pytest

from blockrag.errors import SetupError
from blockrag.evaluation.experiment import write_together


def test_files_appear_together_and_replace_older_ones(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results"
    write_together(out, {"a.json": b"1", "b.md": b"2"})
    write_together(out, {"a.json": b"3"})
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {"a.json": b"3", "b.md": b"2"}


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path) -> None:
    class Interrupting(dict[str, bytes]):
        def items(self) -> object:  # type: ignore[override]
            yield "a.json", b"new"
            raise KeyboardInterrupt

    write_together(tmp_path, {"a.json": b"old"})
    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path, Interrupting())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.json": b"old"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file"):
        write_together(tmp_path / "file", {"a": b""})
