"""Files behind an fsspec URL: a directory that machines share, or a bucket. Called in threads; fsspec says how long.

Whatever a library raises becomes an ``OSError``. A file is there whole or not at all: a put is atomic where there are
objects, elsewhere it is written under another name first.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from blockrag.kv_cache.block_files import UNFINISHED

_OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"))
"""Protocols whose files appear when they are whole, and that know no folders to make."""
_REMOVALS = 3
"""Others may write into a folder while it is removed, and remove one that is written into."""


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class Volume:
    """Files by their path below the URL."""

    def __init__(self, url: str) -> None:
        """Opens nothing."""
        self._url = url

    @_errors()
    def open(self) -> None:
        """Loads the protocol's package and connects, once; every other method does so where it was not done."""
        _ = self._place

    @_errors()
    def read(self, path: str) -> bytes:
        """A file's bytes. Raises ``FileNotFoundError`` where there is none."""
        content: bytes = self._filesystem.cat_file(self._at(path))
        return content

    @_errors()
    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> bool:
        """Writes a file; False: there is one already."""
        filesystem, target = self._filesystem, self._at(path)
        self._check_there()
        if filesystem.exists(target):
            return False
        content = b"".join(parts)
        if self._holds_objects:
            filesystem.pipe_file(target, content)
            return True
        for attempt in range(_REMOVALS):
            unfinished = f"{target}.{uuid.uuid4().hex}{UNFINISHED}"
            filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                filesystem.pipe_file(unfinished, content)
                filesystem.mv(unfinished, target)
                return True
            except BaseException as error:
                with contextlib.suppress(Exception):
                    filesystem.rm_file(unfinished)
                # the folder went with the documents that another purged there
                if not isinstance(error, FileNotFoundError) or attempt == _REMOVALS - 1:
                    raise
        raise AssertionError("unreachable")

    @_errors()
    def remove(self, path: str) -> None:
        """Removes a file. One that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._at(path))

    @_errors()
    def remove_folder(self, folder: str) -> None:
        """Removes all files below a folder; returns once the volume has said that none is there."""
        last: Exception | None = None
        for _ in range(_REMOVALS):
            self._check_there()
            try:
                self._filesystem.rm(self._at(folder), recursive=True)
            except FileNotFoundError:
                return
            except Exception as error:
                last = error
        raise last or OSError("others keep writing into the folder")

    def _check_there(self) -> None:
        """Raises ``OSError`` where folders are real and the root is none: a directory that is not mounted is not an
        empty one."""
        filesystem, root = self._place
        filesystem.invalidate_cache()  # others write and remove as well
        if not self._holds_objects and not filesystem.isdir(root):
            raise OSError(f"{root}: no such directory; make it, or mount what holds it")

    def check(self) -> None:
        """Writes, reads and removes a file. Raises ``OSError`` that says which of them failed."""
        path, content = f"check-{uuid.uuid4().hex}", b"blockrag doctor"
        step = "written"
        try:
            self.write(path, [content])
            step = "read"
            if self.read(path) != content:
                raise OSError("what was read is not what was written")
            step = "removed"
            self.remove(path)
        except OSError as error:
            if step == "read":
                with contextlib.suppress(OSError):
                    self.remove(path)
            raise OSError(f"a file cannot be {step}: {error}") from error.__cause__ or error

    @cached_property
    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # not where there is no volume

        filesystem, root = url_to_fs(self._url)
        filesystem.exists(root)
        return filesystem, root.rstrip("/")

    @property
    def _filesystem(self) -> Any:
        return self._place[0]

    @property
    def _holds_objects(self) -> bool:
        protocol = self._filesystem.protocol
        return not _OBJECT_STORES.isdisjoint((protocol,) if isinstance(protocol, str) else protocol)

    def _at(self, path: str) -> str:
        return f"{self._place[1]}/{path}"
