"""SHA-256 of files, computed once for each state of a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from blockrag.modeling.cache import remembered_sha256
from blockrag.modeling.files import file_sha256

_SIZE = 2**20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that nobody has touched for a while."""
    made = tmp_path / "weights"
    made.write_bytes(os.urandom(_SIZE))
    time.sleep(2.1)
    return made


def record(cache: Path) -> Path:
    [found] = (cache / "digests").iterdir()
    return found


def pretend(cache: Path) -> str:
    """Write another digest where one is remembered, so that it shows whether the file is read again."""
    known = json.loads(record(cache).read_text())
    record(cache).write_text(json.dumps({**known, "sha256": "remembered"}))
    return "remembered"


def test_a_file_is_read_once(file: Path, cache: Path) -> None:
    assert remembered_sha256(file) == file_sha256(file)
    assert remembered_sha256(file) == file_sha256(file)
    pretended = pretend(cache)
    assert remembered_sha256(file) == pretended


def test_a_file_that_changed_is_read_again(file: Path, cache: Path) -> None:
    before = file.stat()
    remembered_sha256(file)
    pretend(cache)
    with file.open("r+b") as opened:  # as little as can be, and put back in time
        opened.write(b"0" if opened.read(1) != b"0" else b"1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert remembered_sha256(file) == file_sha256(file)


def test_another_file_in_its_place_is_read(file: Path, cache: Path, tmp_path: Path) -> None:
    remembered_sha256(file)
    pretend(cache)
    other = tmp_path / "other"
    other.write_bytes(os.urandom(_SIZE))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert remembered_sha256(file) == file_sha256(file)


def test_what_has_just_changed_and_what_is_small_are_not_remembered(file: Path, cache: Path, tmp_path: Path) -> None:
    file.write_bytes(os.urandom(_SIZE))
    small = tmp_path / "small"
    small.write_bytes(b"small")
    for each in (file, small):
        assert remembered_sha256(each) == file_sha256(each)
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["others may write", "a link", "no json", "another form"])
def test_what_may_not_be_ours_is_not_believed(damage: str, file: Path, cache: Path, tmp_path: Path) -> None:
    remembered_sha256(file)
    pretend(cache)
    place = record(cache)
    if damage == "others may write":
        place.chmod(0o666)
    elif damage == "a link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text("{" if damage == "no json" else "[]")
    assert remembered_sha256(file) == file_sha256(file)


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/full"])
def test_a_cache_that_cannot_be_written_remembers_nothing(
    place: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKRAG_CACHE", place)
    assert remembered_sha256(file) == file_sha256(file)
