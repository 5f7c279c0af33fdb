"""Which blocks a shard holds: a byte-budget LRU with pins, expiry, tenant shares and purge by document.

Pure bookkeeping in one thread: what an entry refers to is opaque, and dropping the reference is what frees the object.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from blockrag.kv_cache.purge_log import Departed, PurgeJournal, process_start
from blockrag.kv_cache.shard_messages import DocumentId
from blockrag.types import FULL, BlockForm
from blockrag.v1.kv_cache_pb2 import TenantUsage


@dataclass
class Entry:
    """One held block."""

    key: str
    ref: Any
    nbytes: int
    tenant: str
    documents: set[DocumentId]
    """Every document it was asked for; equal passages of two documents are one entry."""
    pins: set[DocumentId]
    """Documents that keep it: neither evicted nor expired while there is one."""
    generation: int
    form: BlockForm
    encode_s: float = 0.0
    """Seconds that encoding it took."""
    last_use: float = 0.0


@dataclass
class _Tenant:
    nbytes: int = 0
    pinned_bytes: int = 0
    blocks: int = 0
    lru: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Keys of blocks that may be evicted, least recently used first."""


class BlockStore:
    """Entries by key.

    ``tenant_share`` is the most of the budget, as a fraction, that one tenant may hold: a tenant that reaches it makes
    room among its own blocks. ``ttl_s`` counts from a block's last use; 0 keeps blocks for ever. ``clock`` gives
    seconds.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        tenant_share: float = 1.0,
        ttl_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        journal: PurgeJournal | None = None,
        departed: Departed | None = None,
    ) -> None:
        if budget_bytes <= 0:
            raise ValueError("budget_bytes must be positive")
        if not 0 < tenant_share <= 1:
            raise ValueError("tenant_share must be in (0, 1]")
        self.budget_bytes = budget_bytes
        self.tenant_budget_bytes = int(budget_bytes * tenant_share)
        self.journal = PurgeJournal() if journal is None else journal
        self.nbytes = 0
        self.form_blocks: Counter[BlockForm] = Counter()
        self.form_bytes: Counter[BlockForm] = Counter()
        self.evictions = 0
        self.expirations = 0
        self.lost = 0
        self._departed = Departed() if departed is None else departed
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._lru: OrderedDict[str, None] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}
        self._documents: dict[DocumentId, set[str]] = {}
        self._generations = itertools.count(process_start())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Whether the key is held; touches nothing."""
        self.expire()
        return key in self._entries

    @property
    def pinned_blocks(self) -> int:
        """Blocks that stay whatever happens."""
        return len(self._entries) - len(self._lru)

    def tenants(self) -> list[TenantUsage]:
        """What each tenant holds."""
        return [TenantUsage(tenant=name, blocks=held.blocks, bytes=held.nbytes) for name, held in self._tenants.items()]

    def get(self, key: str, document: DocumentId, *, pin: bool = False) -> Entry | None:
        """The entry, made the most recently used and noted as part of the document; None: not held."""
        self.expire()
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._link(entry, document)
        if pin:
            self._pin(entry, document)
        self._touch(entry)
        return entry

    def put(
        self,
        key: str,
        ref: Any,
        nbytes: int,
        tenant: str,
        documents: Iterable[DocumentId],
        pins: Iterable[DocumentId],
        form: BlockForm = FULL,
        encode_s: float = 0.0,
    ) -> Entry | None:
        """Stores a block, after making room: first among the tenant's own blocks when it is over its share.

        None: beside what is pinned there is no room for it; it is not stored, and evicts nothing.
        """
        self.expire()
        self._remove(key)
        owner = self._tenants.get(tenant, _Tenant())
        pinned_bytes = sum(each.pinned_bytes for each in self._tenants.values())
        if owner.pinned_bytes + nbytes > self.tenant_budget_bytes or pinned_bytes + nbytes > self.budget_bytes:
            self._departed.add(key, documents)
            return None
        while owner.nbytes + nbytes > self.tenant_budget_bytes:
            self._evict(next(iter(owner.lru)))
        while self.nbytes + nbytes > self.budget_bytes:
            self._evict(next(iter(self._lru)))
        entry = Entry(key, ref, nbytes, tenant, set(), set(), next(self._generations), form, encode_s)
        self._insert(entry)
        for document in documents:
            self._link(entry, document)
        for document in pins:
            self._link(entry, document)
            self._pin(entry, document)
        return entry

    def lose(self, key: str, generation: int = 0) -> bool:
        """Forgets a block whose object is gone; a stale generation changes nothing, 0 stands for any."""
        entry = self._entries.get(key)
        if entry is None or generation not in (0, entry.generation):
            return False
        self._depart(entry)
        self.lost += 1
        return True

    def set_pins(self, document: DocumentId, pinned: bool) -> int:
        """Pins or unpins a document's blocks, or a collection's; the number of blocks that changed."""
        changed = 0
        for each in _matching(document, self._documents):
            for key in self._documents[each]:
                entry = self._entries[key]
                if pinned == (each in entry.pins):
                    continue
                if pinned:
                    self._pin(entry, each)
                else:
                    self._unpin(entry, each)
                changed += 1
        return changed

    def purge(self, document: DocumentId, also: Iterable[str] = ()) -> int:
        """Forgets a document's blocks, or a collection's, and tells the readers; the number of blocks forgotten.

        A block that another document shares stays, for that document. ``also`` are keys to tell the readers of, such
        as those being encoded. Pins do not protect from a purge.
        """
        told = set(also)
        forgotten = 0
        for each in _matching(document, self._documents):
            for key in list(self._documents[each]):
                entry = self._entries[key]
                self._unlink(entry, each)
                if not any(other.named for other in entry.documents):
                    self._remove(key)
                    told.add(key)
                    forgotten += 1
        for each in _matching(document, self._departed.documents):
            told |= self._departed.take(each)
        self.journal.append(sorted(told))
        if self._departed.overflowed:
            self.journal.reset_readers()
            self._departed.clear()  # no reader has a copy left of what departed until now
        return forgotten

    def expire(self) -> None:
        """Forgets blocks unused for longer than the time to live."""
        if not self._ttl_s:
            return
        oldest_kept = self._clock() - self._ttl_s
        while self._lru:
            entry = self._entries[next(iter(self._lru))]
            if entry.last_use >= oldest_kept:
                return
            self._depart(entry)
            self.expirations += 1

    def _evict(self, key: str) -> None:
        self._depart(self._entries[key])
        self.evictions += 1

    def _depart(self, entry: Entry) -> None:
        self._departed.add(entry.key, entry.documents)
        self._remove(entry.key)

    def _insert(self, entry: Entry) -> None:
        entry.last_use = self._clock()
        tenant = self._tenants.setdefault(entry.tenant, _Tenant())
        self._entries[entry.key] = entry
        self._lru[entry.key] = None
        tenant.lru[entry.key] = None
        tenant.blocks += 1
        tenant.nbytes += entry.nbytes
        self.nbytes += entry.nbytes
        self.form_blocks[entry.form] += 1
        self.form_bytes[entry.form] += entry.nbytes

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        tenant = self._tenants[entry.tenant]
        self._lru.pop(key, None)
        tenant.lru.pop(key, None)
        tenant.blocks -= 1
        tenant.nbytes -= entry.nbytes
        self.nbytes -= entry.nbytes
        self.form_blocks[entry.form] -= 1
        self.form_bytes[entry.form] -= entry.nbytes
        if entry.pins:
            tenant.pinned_bytes -= entry.nbytes
        if not tenant.blocks:
            del self._tenants[entry.tenant]
        for document in list(entry.documents):
            self._unindex(key, document)

    def _touch(self, entry: Entry) -> None:
        entry.last_use = self._clock()
        if not entry.pins:
            self._lru.move_to_end(entry.key)
            self._tenants[entry.tenant].lru.move_to_end(entry.key)

    def _link(self, entry: Entry, document: DocumentId) -> None:
        entry.documents.add(document)
        self._documents.setdefault(document, set()).add(entry.key)

    def _unlink(self, entry: Entry, document: DocumentId) -> None:
        if document in entry.pins:
            self._unpin(entry, document)
        entry.documents.discard(document)
        self._unindex(entry.key, document)

    def _unindex(self, key: str, document: DocumentId) -> None:
        keys = self._documents[document]
        keys.discard(key)
        if not keys:
            del self._documents[document]

    def _pin(self, entry: Entry, document: DocumentId) -> None:
        if not entry.pins:
            tenant = self._tenants[entry.tenant]
            tenant.pinned_bytes += entry.nbytes
            del self._lru[entry.key]
            del tenant.lru[entry.key]
        entry.pins.add(document)

    def _unpin(self, entry: Entry, document: DocumentId) -> None:
        entry.pins.discard(document)
        if not entry.pins:
            tenant = self._tenants[entry.tenant]
            tenant.pinned_bytes -= entry.nbytes
            entry.last_use = self._clock()
            self._lru[entry.key] = None
            tenant.lru[entry.key] = None


def _matching(document: DocumentId, known: Collection[DocumentId]) -> list[DocumentId]:
    """The document itself if known, or every document of its collection when it names none."""
    if document.document_id:
        return [document] if document in known else []
    return [each for each in known if each.tenant == document.tenant and each.collection == document.collection]
