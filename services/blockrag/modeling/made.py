"""Folders in the user's cache that are made once per machine, whole or not there.

A folder appears by a rename, and one process makes it while others wait: a lock file beside it is held, which a killed
process gives up. ``converted.json``, written last, says how large each file is and what its SHA-256 is. Sizes are
compared whenever it is opened.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockrag.modeling.files import file_sha256

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
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(staging)
        written = sorted(staging.iterdir())
        facts = {item.name: {"size": item.stat().st_size, "sha256": file_sha256(item)} for item in written}
        (staging / _RECORD).write_text(json.dumps({"source": source, "files": facts}, indent=2), encoding="utf-8")
        for item in (staging, *staging.iterdir()):
            item.chmod(0o755 if item.is_dir() else 0o644)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
