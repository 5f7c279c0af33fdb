"""The user's cache: what can be made again, kept between processes.

Folders in it are made once per machine, whole or not there. A folder appears by a rename, and one process makes it
while others wait: a lock file beside it is held, which a killed process gives up. ``converted.json``, written last,
says how large each file is and what its SHA-256 is. Sizes are compared whenever it is opened.

SHA-256 of files that every start checks is computed once for each state of a file on this machine. What was computed
lies in ``digests/`` with the file's device, inode, size and the times of its last change of content and of anything at
all. The last of them no program can set, so a file that is the same in all has the content that it had, unless the disk
itself changed it: ``blockrag bundle verify`` reads everything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockrag.modeling.files import file_sha256, staged

CACHE_VARIABLE = "BLOCKRAG_CACHE"
"""Environment variable that names the directory. No setting: training and the engine know no settings."""


def cache_dir() -> Path:
    """``BLOCKRAG_CACHE``, else ``blockrag`` in ``XDG_CACHE_HOME``, else ``~/.cache/blockrag``; it need not exist.

    Raises RuntimeError where the user has no home directory.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockrag"


_RECORD = "converted.json"
_LOCK_PAUSE_S = 0.05


def made(folder: Path, make: Callable[[Path], None], source: str) -> Path:
    """``folder``; if it is not whole, it is made now: ``make`` fills the empty directory that it is given.

    ``source`` is what it is made of, for who reads the record. Raises OSError where the cache cannot be written, and
    what ``make`` raises; then nothing is left behind.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not is_whole(folder):  # another process was faster
            _make(folder, make, source)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether all files are there in the sizes that they were written with."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return -1

    facts = _record(folder)
    return bool(facts) and all(size(folder / name) == item["size"] for name, item in facts.items())


def changed_file(folder: Path, sha256: Callable[[Path], str] = file_sha256) -> Path | None:
    """The first file with another content than was written; None where all are as they were, or none are."""
    for name, facts in _record(folder).items() if is_whole(folder) else ():
        if sha256(folder / name) != facts["sha256"]:
            return folder / name
    return None


def _make(folder: Path, make: Callable[[Path], None], source: str) -> None:
    for leftover in (folder, *folder.parent.glob(f".{folder.name}-*")):  # of killed processes: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with staged(folder) as staging:
        make(staging)
        written = sorted(staging.iterdir())
        facts = {item.name: {"size": item.stat().st_size, "sha256": file_sha256(item)} for item in written}
        (staging / _RECORD).write_text(json.dumps({"source": source, "files": facts}, indent=2), encoding="utf-8")


def _record(folder: Path) -> dict[str, dict[str, Any]]:
    """What the folder must hold; empty where that cannot be read."""
    try:
        files = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
        return {
            str(name): {"size": int(facts["size"]), "sha256": str(facts["sha256"])} for name, facts in files.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                time.sleep(_LOCK_PAUSE_S)  # not a blocking lock: that one holds up the interpreter's signals
        yield


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
