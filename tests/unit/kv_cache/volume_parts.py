"""Volumes in tests: in memory and in a folder, and a tier before one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from blockrag.kv_cache.volume import Volume
from blockrag.kv_cache.volume_tier import VolumeTier
from tests.unit.kv_cache.disk_parts import as_object, read


def stored(url: str) -> dict[str, bytes]:
    """Every file below the URL."""
    protocol, _, root = url.partition("://")
    if protocol == "memory":
        files = {name: bytes(file.getbuffer()) for name, file in MemoryFileSystem.store.items()}
        return {
            name.removeprefix(f"{root}/"): content for name, content in files.items() if name.startswith(f"{root}/")
        }
    paths = (path for path in Path(root).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def store(url: str, path: str, content: bytes) -> None:
    """Puts a file there, in another's place too."""
    volume = Volume(url)
    volume.remove(path)
    volume.write(path, [content])


def open_volume_tier(volume: str | Volume) -> VolumeTier:
    return VolumeTier(Volume(volume) if isinstance(volume, str) else volume, put=as_object, read=read)


class HangingVolume(Volume):
    """Answers nothing before it is released."""

    def __init__(self) -> None:
        super().__init__("memory://")
        self.released = threading.Event()
        self.calls = 0

    def open(self) -> None:
        pass

    def read(self, path: str) -> bytes:
        self._wait()
        raise FileNotFoundError(path)

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> bool:
        self._wait()
        return True

    def remove(self, path: str) -> None:
        self._wait()

    def remove_folder(self, folder: str) -> None:
        self._wait()

    def _wait(self) -> None:
        self.calls += 1
        assert self.released.wait(30)
