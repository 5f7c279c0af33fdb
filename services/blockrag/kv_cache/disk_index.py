"""Which blocks a shard has on disk: found at its start, then within a byte budget; evictions count use and cost."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from blockrag.errors import DataError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.block_files import UNFINISHED, block_paths, read_header, remove_file
from blockrag.limits import DISK_RESERVE, MIB

CANDIDATES = 16
"""Of so many blocks, those unused for longest, the one that is cheapest to encode again for its bytes makes room."""
_FILE_UNIT = 4096
"""What a file takes of a disk is a multiple of this."""

_logger = logging.getLogger(__name__)


@dataclass
class DiskEntry:
    """A block's file."""

    key: str
    folder: str
    """Of the document that it belongs to."""
    nbytes: int
    """Of the disk."""
    tenant: str
    encode_s: float
    """Seconds that encoding it took."""
    last_use: float
    """Seconds since 1970."""
    noted_use: float = 0.0
    """The use that its file's time says."""


def on_disk(nbytes: int) -> int:
    """Bytes of disk that a file of ``nbytes`` takes."""
    return -(-nbytes // _FILE_UNIT) * _FILE_UNIT


class DiskIndex:
    """Entries by key, in the order of their use."""

    def __init__(self, budget_bytes: int, tenant_share: float = 1.0) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._tenant_budget = int(budget_bytes * tenant_share)
        self._entries: OrderedDict[str, DiskEntry] = OrderedDict()
        self._tenants: dict[str, OrderedDict[str, DiskEntry]] = {}
        self._tenant_bytes: dict[str, int] = {}
        self._folders: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> DiskEntry | None:
        """The entry; it is not used by that."""
        return self._entries.get(key)

    def has_room(self, nbytes: int, tenant: str) -> bool:
        """Whether a block fits without any other's making room."""
        held = self._tenant_bytes.get(tenant, 0)
        return self.nbytes + nbytes <= self.budget_bytes and held + nbytes <= self._tenant_budget

    def make_room(self, nbytes: int, tenant: str) -> list[DiskEntry] | None:
        """Removes what must go for a block of ``nbytes``, the tenant's own first where it is over its share.

        None: it would not fit into an empty disk; nothing is removed then.
        """
        if nbytes > min(self.budget_bytes, self._tenant_budget):
            return None
        removed = []
        while self._tenant_bytes.get(tenant, 0) + nbytes > self._tenant_budget:
            removed.append(self._evict(self._tenants[tenant].values()))
        while self.nbytes + nbytes > self.budget_bytes:
            removed.append(self._evict(self._entries.values()))
        return removed

    def add(self, entry: DiskEntry) -> None:
        """Adds an entry, the one used last; there must be room for it."""
        self.remove(entry.key)
        self._entries[entry.key] = entry
        self._tenants.setdefault(entry.tenant, OrderedDict())[entry.key] = entry
        self._tenant_bytes[entry.tenant] = self._tenant_bytes.get(entry.tenant, 0) + entry.nbytes
        self._folders.setdefault(entry.folder, set()).add(entry.key)
        self.nbytes += entry.nbytes

    def remove(self, key: str) -> None:
        """Forgets an entry, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._tenants[entry.tenant][key]
            self._tenant_bytes[entry.tenant] -= entry.nbytes
            if not self._tenants[entry.tenant]:
                del self._tenants[entry.tenant], self._tenant_bytes[entry.tenant]
            self._unfile(entry)
            self.nbytes -= entry.nbytes

    def touch(self, key: str, now: float) -> None:
        """Makes an entry the one used last."""
        entry = self._entries[key]
        entry.last_use = now
        self._entries.move_to_end(key)
        self._tenants[entry.tenant].move_to_end(key)

    def move(self, key: str, folder: str) -> None:
        """Gives an entry to another document."""
        entry = self._entries[key]
        self._unfile(entry)
        entry.folder = folder
        self._folders.setdefault(folder, set()).add(key)

    def below(self, folder: str) -> list[str]:
        """Keys of a document's folder, or of those of a collection."""
        if folder in self._folders:
            return list(self._folders[folder])
        return [key for name, keys in self._folders.items() if name.startswith(f"{folder}/") for key in keys]

    def expire(self, oldest_kept: float) -> list[DiskEntry]:
        """Removes what was not used since."""
        removed = list(takewhile(lambda entry: entry.last_use < oldest_kept, self._entries.values()))
        for entry in removed:
            self.remove(entry.key)
        return removed

    def _evict(self, in_order_of_use: Iterable[DiskEntry]) -> DiskEntry:
        candidates = islice(in_order_of_use, CANDIDATES)
        chosen = min(candidates, key=lambda entry: entry.encode_s / max(1, entry.nbytes))
        self.remove(chosen.key)
        return chosen

    def _unfile(self, entry: DiskEntry) -> None:
        keys = self._folders[entry.folder]
        keys.discard(entry.key)
        if not keys:
            del self._folders[entry.folder]


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
