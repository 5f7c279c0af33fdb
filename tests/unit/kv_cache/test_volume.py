from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from blockrag.kv_cache.volume import Volume
from tests.unit.kv_cache.volume_parts import stored


def test_files_are_written_once_read_and_removed(url: str) -> None:
    volume = Volume(url)
    volume.open()
    with pytest.raises(FileNotFoundError):
        volume.read("t/c/d/one")
    assert volume.write("t/c/d/one", [b"a", memoryview(b"b")])
    assert not volume.write("t/c/d/one", [b"another"])
    assert Volume(url).read("t/c/d/one") == b"ab"
    assert stored(url) == {"t/c/d/one": b"ab"}
    volume.remove("t/c/d/one")
    volume.remove("t/c/d/one")
    assert stored(url) == {}


def test_a_folder_is_removed_with_all_below_it_and_nothing_else(url: str) -> None:
    volume = Volume(url)
    volume.remove_folder("t/c")
    for path in ("t/c/d/one", "t/c/d/two", "t/c/e/one", "t/cc/d/one"):
        volume.write(path, [b"a"])
    volume.remove_folder("t/c/d")
    assert set(stored(url)) == {"t/c/e/one", "t/cc/d/one"}
    volume.remove_folder("t/c")
    volume.remove_folder("t/c")
    assert set(stored(url)) == {"t/cc/d/one"}


def test_a_path_without_a_protocol_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    Volume(f"{tmp_path}/volume/").write("t/one", [b"a"])
    assert (tmp_path / "volume" / "t" / "one").read_bytes() == b"a"


def test_a_directory_that_is_not_mounted_is_not_an_empty_one(tmp_path: Path) -> None:
    volume = Volume(f"file://{tmp_path}/mount/blocks")
    for call in (lambda: volume.write("t/one", [b"a"]), lambda: volume.remove_folder("t")):
        with pytest.raises(OSError, match="no such directory; make it, or mount"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_removes_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Any = LocalFileSystem.pipe_file
    removed = []

    def after_a_purge(self: LocalFileSystem, path: str, value: bytes) -> None:
        if not removed:
            removed.append(path)
            self.rm(f"{tmp_path}/t", recursive=True)
        write(self, path, value)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", after_a_purge)
    assert Volume(f"file://{tmp_path}").write("t/d/one", [b"a"])
    assert [path.name for path in (tmp_path / "t" / "d").iterdir()] == ["one"]


def test_a_file_of_a_folder_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}"
    write: Any = LocalFileSystem.pipe_file

    def fail_in_the_middle(self: LocalFileSystem, path: str, value: bytes) -> NoReturn:
        write(self, path, value[:1])
        assert "t/one" not in stored(url)
        raise OSError("No space left on device")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", fail_in_the_middle)
    with pytest.raises(OSError, match="No space"):
        Volume(url).write("t/one", [b"abc"])
    assert stored(url) == {}


def test_many_writers_of_one_file_leave_one(url: str) -> None:
    writers = [threading.Thread(target=Volume(url).write, args=("t/c/d/one", [b"a" * 10**6])) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert stored(url) == {"t/c/d/one": b"a" * 10**6}


@pytest.mark.parametrize(
    ("of", "error", "text"),
    [
        ("s4://bucket", ValueError, "ValueError: Protocol not known: s4"),
        ("dvc://repository", ImportError, "ImportError: Install dvc"),
    ],
)
def test_errors_of_any_kind_are_those_of_files(of: str, error: type[Exception], text: str) -> None:
    volume = Volume(of)
    for call in (volume.open, volume.check, lambda: volume.read("x"), lambda: volume.remove_folder("x")):
        with pytest.raises(OSError, match=text) as raised:
            call()
        assert isinstance(raised.value.__cause__, error)


def test_a_folder_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(f"file://{tmp_path}")
    volume.write("t/c/one", [b"a"])

    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(LocalFileSystem, "rm", refuse)
    with pytest.raises(PermissionError, match="Access Denied"):
        volume.remove_folder("t/c")
    monkeypatch.setattr(LocalFileSystem, "rm", lambda *_, **__: None)
    with pytest.raises(OSError, match="keep writing"):
        volume.remove_folder("t/c")


def test_a_check_leaves_nothing(url: str) -> None:
    Volume(url).check()
    assert stored(url) == {}


def test_without_a_volume_fsspec_is_not_loaded() -> None:
    code = "import sys, blockrag.kv_cache.shard; print('fsspec' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
