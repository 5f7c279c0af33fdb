"""The embedded index's folder: one process holds it, and there is room on its disk before the engine writes.

The engine writes through mapped sparse files: on a full disk the kernel ends the process that writes (SIGBUS), and the
next one too while it opens the files. So nothing is begun that a disk nearly full could stop half way.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

from blockrag.errors import OverloadedError, UnavailableError
from blockrag.limits import MIB

DOCUMENTS_MIB = 256
"""What must be free where passages are added: a batch, and the segments that are copied when they are optimized."""
CHANGES_MIB = 64
"""What must be free where shards are opened, documents made visible or removed."""
_RETRY_MS = 60_000
_LOCK_POLL_S = 0.1

_logger = logging.getLogger(__name__)


class DiskRoom:
    """Of the disk that holds a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def for_documents(self) -> None:
        """Raises ``OverloadedError`` where no more may be added."""
        free = self._free_mib()
        if free < DOCUMENTS_MIB:
            self._tell(free, DOCUMENTS_MIB)
            raise OverloadedError(
                f"the index's disk has {free} MiB free and takes documents from {DOCUMENTS_MIB}", _RETRY_MS
            )

    def for_changes(self) -> None:
        """Raises ``UnavailableError`` where nothing may be written at all."""
        free = self._free_mib()
        if free < CHANGES_MIB:
            self._tell(free, CHANGES_MIB)
            raise UnavailableError(f"the index's disk has {free} MiB free; it is opened and changed from {CHANGES_MIB}")

    def _free_mib(self) -> int:
        status = os.statvfs(self._path)
        return status.f_bavail * status.f_frsize // MIB

    def _tell(self, free: int, needed: int) -> None:
        _logger.warning("the disk of %s has %d MiB free, %d are needed: make room", self._path, free, needed)


def locked(path: Path, wait_s: float) -> IO[str]:
    """Holds a file of the folder until it is closed. Raises ``UnavailableError`` when another process keeps it."""
    handle = path.open("a+")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                handle.close()
                raise UnavailableError(
                    f"the vector index in {path.parent} is in use by another process;"
                    " the embedded index serves one replica, use a Qdrant server for more"
                ) from None
            time.sleep(_LOCK_POLL_S)
        else:
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            return handle
