"""SHA-256 of files that every start checks, computed once for each state of a file on this machine.

What was computed lies in ``digests/`` of ``cache_dir()``, with the file's device, inode, size and the times of its last
change of content and of anything at all. The last of them no program can set, so a file that is the same in all has the
content that it had, unless the disk itself changed it: ``blockrag bundle verify`` reads everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from pathlib import Path

from blockrag.modeling.cache import cache_dir
from blockrag.modeling.files import file_sha256

_LEAST_BYTES = 2**20
"""Smaller files are read as fast."""
_SETTLED_NS = 2 * 10**9
"""A file that changed so recently may change again without another time: clocks of file systems are coarse."""


def remembered_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, as ``file_sha256``; what others may have written is not believed."""
    before = _state(path)
    if before[2] < _LEAST_BYTES:
        return file_sha256(path)
    try:
        place = cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    except RuntimeError:  # no home directory
        return file_sha256(path)
    known = _read(place, before)
    if known is not None:
        return known
    found = file_sha256(path)
    if _state(path) == before and time.time_ns() - max(before[3:]) > _SETTLED_NS:
        with contextlib.suppress(OSError):  # a cache that cannot be written remembers nothing
            _write(place, json.dumps({"path": str(path), "state": before, "sha256": found}))
    return found


def is_ours(path: Path) -> bool:
    """Whether nobody but this user and root may have written ``path``, which must be a plain file or a directory."""
    found = path.lstat()
    plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return plain and found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read(place: Path, state: list[int]) -> str | None:
    try:
        if not is_ours(place):
            return None
        record = json.loads(place.read_text(encoding="utf-8"))
        return str(record["sha256"]) if record["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    written = place.with_name(f".{place.name}-{os.getpid()}")
    written.write_text(text, encoding="utf-8")
    written.chmod(0o600)
    written.replace(place)
