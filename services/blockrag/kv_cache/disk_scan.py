"""What a shard finds on its disk when it starts: its blocks, and how much room there is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from blockrag.errors import DataError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.block_files import UNFINISHED, block_paths, read_header, remove_file
from blockrag.kv_cache.disk_index import DiskEntry, on_disk
from blockrag.limits import DISK_RESERVE, MIB

_logger = logging.getLogger(__name__)


def scan(root: Path, keys: KeyMaker, owns: Callable[[str], bool]) -> tuple[list[DiskEntry], int]:
    """The blocks whose keys ``owns``, the one used last in the end, and how many files were of no use and removed.

    Makes the folder. Raises ``OSError`` where nothing can be kept.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"{root} cannot be written")
    found = []
    rejected = 0
    for path in block_paths(root):
        if not owns(path.name.removesuffix(UNFINISHED)):
            continue
        try:
            found.append(_entry(root, path, keys))
        except FileNotFoundError:  # by another shard's purge
            continue
        except (DataError, OSError) as error:
            _logger.info("removing a block's file: %s", error)
            rejected += 1
            remove_file(path)
    return sorted(found, key=lambda entry: entry.last_use), rejected


def space(folder: Path) -> tuple[int, int]:
    """Bytes of the folder's disk: those free, and those that are to stay so."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize, int(DISK_RESERVE * status.f_blocks * status.f_frsize)


def affordable(root: Path, budget_bytes: int, held: int, shards: int) -> tuple[int, str]:
    """The budget, or what the disk has for one of ``shards`` that has ``held`` bytes there, and then a warning."""
    free, reserve = space(root)
    room = max(0, held + (free - reserve) // shards)
    if room >= budget_bytes:
        return budget_bytes, ""
    return room, (
        f"kv_cache.disk_mb is cut to {room // MIB} MiB of a shard's {budget_bytes // MIB}: {root} has "
        f"{free // MIB} MiB free, and {reserve // MIB} ({DISK_RESERVE:.0%} of the disk) stay so"
    )


def _entry(root: Path, path: Path, keys: KeyMaker) -> DiskEntry:
    if path.name.endswith(UNFINISHED):
        raise DataError(f"{path}: was not finished")
    header = read_header(path, keys)
    status = path.stat()
    folder = path.parent.relative_to(root).as_posix()
    used = status.st_mtime
    return DiskEntry(path.name, folder, on_disk(status.st_size), header.tenant, header.encode_s, used, used)
