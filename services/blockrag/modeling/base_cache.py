"""Converted GGUF files: one Hugging Face checkpoint per file and machine, in the user's cache.

``bases/SHA-vN`` in ``cache_dir()``: named after the file's SHA-256 and the converter's version, so nothing in it is
ever out of date. It appears whole, by a rename, and one process converts while others wait for it: a lock file beside
it is held, which a killed process gives up. ``converted.json``, written last, says how large each file is and what its
SHA-256 is. Sizes are compared whenever it is opened, contents when a bundle is verified: a service with many replicas
does not read it many times before it loads it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blockrag.errors import BundleError
from blockrag.modeling.cache import CACHE_VARIABLE, cache_dir
from blockrag.modeling.files import file_sha256

CONVERTER = 1
"""Version of what ``gguf_file.convert`` writes: with a change of it, every file is converted again."""

_RECORD = "converted.json"
_LOCK_PAUSE_S = 0.05


def converted(path: Path, sha256: str) -> Path:
    """The checkpoint that the GGUF file ``path`` is as a directory; converted now if it is not in the cache.

    Raises BundleError when the file's content is not ``sha256``, when it cannot be read (see ``open_gguf``) and when
    the cache cannot be written: read-only, full. Then nothing is left behind.
    """
    folder = _folder(sha256)
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder):  # another process was faster
                _convert(path, sha256, folder)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{path} is converted once per machine, and {folder.parent} cannot take it: {error}. Name a directory with "
            f"room for some four times the file's {path.stat().st_size / 2**20:.0f} MiB in {CACHE_VARIABLE}"
        ) from error
    return folder


def check_converted(sha256: str) -> None:
    """Compare every file of the converted checkpoint with what was written, if there is one.

    Raises BundleError naming the file that differs.
    """
    folder = _folder(sha256)
    for name, facts in _record(folder).items() if _is_whole(folder) else ():
        if file_sha256(folder / name) != facts["sha256"]:
            raise BundleError(
                f"{folder / name}: content differs from what was converted; delete {folder}, and it is made again"
            )


def _folder(sha256: str) -> Path:
    try:
        return cache_dir() / "bases" / f"{sha256}-v{CONVERTER}"
    except RuntimeError as error:
        raise BundleError(f"no directory for converted files: {error}; name one in {CACHE_VARIABLE}") from error


def _convert(path: Path, sha256: str, folder: Path) -> None:
    try:
        from blockrag.modeling.gguf_file import convert, open_gguf  # what is converted already needs neither
    except ImportError as error:
        raise BundleError(f"{path}: reading GGUF files needs the package gguf: pip install gguf ({error})") from error

    for leftover in (folder, *folder.parent.glob(f".{folder.name}-*")):  # of killed processes: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    if (found := file_sha256(path)) != sha256:
        raise BundleError(f"{path}: content differs: SHA-256 {found}, not {sha256}")
    file = open_gguf(path)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(file, staging)
        written = sorted(staging.iterdir())
        facts = {item.name: {"size": item.stat().st_size, "sha256": file_sha256(item)} for item in written}
        (staging / _RECORD).write_text(json.dumps({"source": path.name, "files": facts}, indent=2), encoding="utf-8")
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


def _is_whole(folder: Path) -> bool:
    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return -1

    facts = _record(folder)
    return bool(facts) and all(size(folder / name) == item["size"] for name, item in facts.items())


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
