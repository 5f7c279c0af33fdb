"""Which blocks a shard has on disk: a byte budget whose evictions count use and cost. Pure bookkeeping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

CANDIDATES = 16
"""Of so many blocks, those unused for longest, the one that is cheapest to encode again for its bytes makes room."""
_FILE_UNIT = 4096
"""What a file takes of a disk is a multiple of this."""


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

    def remove(self, key: str) -> DiskEntry | None:
        """Forgets an entry; it, or None."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._tenants[entry.tenant][key]
            self._tenant_bytes[entry.tenant] -= entry.nbytes
            if not self._tenants[entry.tenant]:
                del self._tenants[entry.tenant], self._tenant_bytes[entry.tenant]
            self._unfile(entry)
            self.nbytes -= entry.nbytes
        return entry

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
        removed = []
        while self._entries and next(iter(self._entries.values())).last_use < oldest_kept:
            entry = self.remove(next(iter(self._entries)))
            assert entry is not None
            removed.append(entry)
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
