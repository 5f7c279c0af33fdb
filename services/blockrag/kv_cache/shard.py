"""A cache shard without Ray: what is held is handed out, what is missing is read from disk or encoded, once.

``encode`` is the seam: it has one block encoded and returns a reference to the object with its size. It raises
``UnavailableError`` when the encoder went away (tried again, elsewhere, and held back when that happens twice:
``suspects.py``), anything else when the block cannot be encoded (given to all who wait).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from blockrag.aio import SingleFlight, gather_or_cancel
from blockrag.errors import UnavailableError
from blockrag.kv_cache.block_requests import add_counts
from blockrag.kv_cache.disk import DiskTier
from blockrag.kv_cache.shard_messages import (
    AcquiredBlock,
    DocumentId,
    EncodedObject,
    PurgeLog,
    Tier,
    WarmOutcome,
)
from blockrag.kv_cache.store import BlockStore
from blockrag.kv_cache.suspects import Suspects
from blockrag.kv_cache.volume_tier import VolumeTier
from blockrag.telemetry.metrics import (
    KV_CACHE_HIT_TOKENS,
    KV_CACHE_QUERY_TOKENS,
    KV_CACHE_USAGE_PERC,
    Counter,
    Gauge,
)
from blockrag.types import BlockForm, BlockRequest
from blockrag.v1.kv_cache_pb2 import GetKvCacheStatusResponse

ENCODE_ATTEMPTS = 4
"""How often a block is sent to the encoder when its replicas die."""
WARM_CONCURRENCY = 64
"""Blocks that warming has in the encoder at a time, over all callers of a shard: two forward passes' worth."""
_FIRST_BACKOFF_S = 0.05

_SHARD = ("shard",)
KV_CACHE_BYTES = Gauge("blockrag_kv_cache_bytes", "Bytes of block KV that a shard holds.", _SHARD)
KV_CACHE_DISK_BYTES = Gauge("blockrag_kv_cache_disk_bytes", "Bytes of disk that a shard's blocks take.", _SHARD)
_COUNTERS = {
    "evictions": Counter("blockrag_kv_cache_evictions", "Blocks removed to make room.", _SHARD),
    "expirations": Counter("blockrag_kv_cache_expirations", "Blocks removed for their age.", _SHARD),
    "lost": Counter("blockrag_kv_cache_lost", "Blocks whose objects the store lost.", _SHARD),
    "joined": Counter("blockrag_kv_cache_joined", "Requests that waited for another's encode.", _SHARD),
}
"""By the counts of a shard's status that they follow; below, of its disk's."""
_DISK_COUNTERS = {
    "evictions": Counter("blockrag_kv_cache_disk_evictions", "Files removed to make room.", _SHARD),
    "rejected": Counter("blockrag_kv_cache_disk_rejected", "Files that were damaged or of another bundle.", _SHARD),
    "dropped": Counter("blockrag_kv_cache_disk_dropped", "Blocks that the disk had no room or no time for.", _SHARD),
}

Encode = Callable[[BlockRequest], Awaitable[EncodedObject]]


@dataclass(eq=False)
class _Encoding:
    """What to do with a block once it is encoded; changes while it is."""

    documents: set[DocumentId] = field(default_factory=set)
    pins: set[DocumentId] = field(default_factory=set)


class _Made(NamedTuple):
    object: EncodedObject
    tier: Tier
    encode_s: float
    """What encoding it took, now or before it was written."""
    lacking: Sequence[DiskTier | VolumeTier]
    """Those that it is to be written to."""


class _Acquired(NamedTuple):
    block: AcquiredBlock
    over_budget: bool


class CacheShard:
    """Serves blocks of one shard; all calls on one event loop."""

    def __init__(
        self,
        store: BlockStore,
        encode: Encode,
        *,
        disk: DiskTier | None = None,
        volume: VolumeTier | None = None,
        warm_concurrency: int = WARM_CONCURRENCY,
    ) -> None:
        self.store = store
        self.disk = disk
        self._tiers: list[DiskTier | VolumeTier] = [tier for tier in (disk, volume) if tier is not None]
        """Of files, in the order in which they are looked into."""
        self.hits: Tally[BlockForm] = Tally()
        self.misses: Tally[BlockForm] = Tally()
        self.joined = 0
        self._encode = encode
        self._flights: SingleFlight[_Acquired] = SingleFlight()
        self._encodings: dict[str, _Encoding] = {}
        self._in_encoder = 0
        self._warming = asyncio.Semaphore(warm_concurrency)
        self._waiting: set[_Encoding] = set()
        """Warmings that have not begun."""
        self._suspects = Suspects()

    async def acquire(self, blocks: Sequence[BlockRequest]) -> list[AcquiredBlock]:
        """The blocks, in order; what is missing is encoded, all at once. Equal keys are one block."""
        distinct = {request.key: request for request in blocks}
        held = (self._held(request, pin=False) for request in distinct.values())
        found = {block.key: block for block in held if block is not None}
        missing = [request for key, request in distinct.items() if key not in found]
        encoded = await gather_or_cancel([self._encoded_or_held(request) for request in missing])
        found.update((block.key, block) for block in encoded)
        return [found[request.key] for request in blocks]

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        """Where each block would come from now; touches nothing."""
        return [self._tier(key) for key in keys]

    def _tier(self, key: str) -> Tier:
        if key in self.store:
            return "store"
        return "disk" if self.disk is not None and key in self.disk.index else "encoded"

    async def warm(self, blocks: Sequence[BlockRequest], pin: bool) -> WarmOutcome:
        """Has blocks held ahead of time, a bounded number of them encoded at a time."""
        distinct = {(request.key, document_of(request)): request for request in blocks}
        outcomes = await gather_or_cancel([self._warm(request, pin) for request in distinct.values()])
        return sum(outcomes, WarmOutcome())

    async def _warm(self, request: BlockRequest, pin: bool) -> WarmOutcome:
        document = document_of(request)
        waiting = _Encoding({document}, {document} if pin else set())
        self._waiting.add(waiting)
        try:
            await self._warming.acquire()
        finally:
            self._waiting.discard(waiting)
        try:
            if not waiting.documents:  # purged meanwhile
                return WarmOutcome()
            pin = bool(waiting.pins)  # or pinned or unpinned
            if self._held(request, pin=pin) is not None:
                return WarmOutcome(hits=1)
            joined = request.key in self._flights
            block, over_budget = await self._encoded(request, pin)
        finally:
            self._warming.release()
        if joined or block.tier != "encoded":
            return WarmOutcome(hits=1, over_budget=over_budget)
        return WarmOutcome(encoded=frozenset([request.key]), encoded_bytes=block.nbytes, over_budget=over_budget)

    async def report_lost(self, keys: Sequence[str], generations: Sequence[int]) -> int:
        """Forgets blocks whose objects could not be read; how many. A newer object of the same key stays."""
        return sum(map(self.store.lose, keys, generations))

    async def purged_since(self, cursor: int) -> PurgeLog:
        """Keys purged since a reader's cursor; 0 for a new reader."""
        self.store.expire()
        return self.store.journal.since(cursor)

    async def set_pins(self, documents: Sequence[DocumentId], pinned: bool) -> int:
        """Pins or unpins documents' blocks; how many changed."""
        for encoding in (*self._encodings.values(), *self._waiting):
            for document in documents:
                chosen = {each for each in encoding.documents if _covers(document, each)}
                encoding.pins = encoding.pins | chosen if pinned else encoding.pins - chosen
        return sum(self.store.set_pins(document, pinned) for document in documents)

    async def purge(self, documents: Sequence[DocumentId]) -> int:
        """Forgets documents' blocks, also those being encoded or written, and removes their files; how many were held.

        None of them is handed out from the call on, and once it returns none is on disk or volume. Raises
        ``UnavailableError`` if a file cannot be removed.
        """
        forgotten = sum(self._purge(document) for document in documents)
        for tier in self._tiers:
            for document in documents:
                await tier.erase(document)
        return forgotten

    async def stats(self) -> GetKvCacheStatusResponse:
        """What is held, and what happened since the start."""
        store = self.store
        store.expire()
        status = GetKvCacheStatusResponse(
            blocks=len(store),
            bytes=store.nbytes,
            budget_bytes=store.budget_bytes,
            pinned_blocks=store.pinned_blocks,
            hits=self.hits.total(),
            misses=self.misses.total(),
            joined=self.joined,
            evictions=store.evictions,
            expirations=store.expirations,
            lost=store.lost,
            shards=1,
            tenants=store.tenants(),
        )
        for form in sorted({*store.form_blocks, *self.hits, *self.misses}, key=str):
            status.forms.add(
                form=str(form),
                blocks=store.form_blocks[form],
                bytes=store.form_bytes[form],
                hits=self.hits[form],
                misses=self.misses[form],
            )
        for tier in self._tiers:
            add_counts(status.disk, tier.usage())
        return status

    def _held(self, request: BlockRequest, *, pin: bool) -> AcquiredBlock | None:
        document = document_of(request)
        entry = self.store.get(request.key, document, pin=pin)
        if entry is None:
            return None
        self.hits[request.form] += 1
        if self.disk is not None and not self.disk.use(request.key, document):
            # Not written when it was encoded, or evicted there since: again, but in no other block's place.
            held = EncodedObject(entry.ref, entry.nbytes)
            self.disk.offer(request, held, _keeper(entry.documents), entry.encode_s, evict=False)
        return AcquiredBlock(request.key, [entry.ref], "store", entry.nbytes, entry.generation)

    async def _encoded_or_held(self, request: BlockRequest) -> AcquiredBlock:
        # Looked for once more, because an encode under way may have ended before this task began.
        held = self._held(request, pin=False)
        return (await self._encoded(request, False)).block if held is None else held

    async def _encoded(self, request: BlockRequest, pin: bool) -> _Acquired:
        key = request.key
        if key in self._flights:
            self.joined += 1
        else:
            self._encodings[key] = _Encoding()
        encoding = self._encodings[key]
        document = document_of(request)
        encoding.documents.add(document)
        if pin:
            encoding.pins.add(document)
        try:
            return await self._flights.run(key, lambda: self._encode_and_store(request, encoding))
        finally:
            if key not in self._flights and self._encodings.get(key) is encoding:
                del self._encodings[key]

    async def _encode_and_store(self, request: BlockRequest, encoding: _Encoding) -> _Acquired:
        key = request.key
        (ref, nbytes), tier, encode_s, lacking = await self._load_or_encode(request)
        if not encoding.documents:  # purged meanwhile: whoever waits may use it, nobody keeps it
            return _Acquired(AcquiredBlock(key, [ref], tier, nbytes), over_budget=False)
        evictions = self.store.evictions
        entry = self.store.put(
            key, ref, nbytes, request.tenant, encoding.documents, encoding.pins, request.form, encode_s
        )
        for files in lacking:
            files.offer(request, EncodedObject(ref, nbytes), _keeper(encoding.documents), encode_s, evict=True)
        generation = entry.generation if entry else 0
        over_budget = entry is None or self.store.evictions > evictions
        return _Acquired(AcquiredBlock(key, [ref], tier, nbytes, generation), over_budget)

    async def _load_or_encode(self, request: BlockRequest) -> _Made:
        for place, tier in enumerate(self._tiers):
            loaded = await tier.load(request, document_of(request))
            if loaded is not None:
                return _Made(loaded[0], tier.name, loaded[1], self._tiers[:place])
        self.misses[request.form] += 1
        # What encoding costs, not what waiting for it takes: blocks of one forward pass share its time.
        self._in_encoder += 1
        together, started = self._in_encoder, time.monotonic()
        try:
            encoded = await self._encode_somewhere(request)
        finally:
            together = max(together, self._in_encoder)
            self._in_encoder -= 1
        return _Made(encoded, "encoded", (time.monotonic() - started) / together, self._tiers)

    async def _encode_somewhere(self, request: BlockRequest) -> EncodedObject:
        for attempt in range(1, ENCODE_ATTEMPTS + 1):
            try:
                async with self._suspects.tried(request.key):
                    return await self._encode(request)
            except UnavailableError:
                if attempt == ENCODE_ATTEMPTS:
                    raise
                await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _purge(self, document: DocumentId) -> int:
        for waiting in self._waiting:
            waiting.documents = {each for each in waiting.documents if not _covers(document, each)}
        told = []
        for key, encoding in self._encodings.items():
            purged = {each for each in encoding.documents if _covers(document, each)}
            if purged:
                encoding.documents -= purged
                encoding.pins -= purged
                if not any(each.named for each in encoding.documents):
                    encoding.documents.clear()
                    encoding.pins.clear()
                    told.append(key)
        in_files = {key for tier in self._tiers for key in tier.forget(document)}
        only_there = sum(key not in self.store for key in in_files)
        return only_there + self.store.purge(document, [*told, *in_files])


def document_of(request: BlockRequest) -> DocumentId:
    """The document that a block is asked for."""
    return DocumentId(request.tenant, request.collection, request.document_id)


def _keeper(documents: Iterable[DocumentId]) -> DocumentId:
    """The document that a block's file goes with: one that can be purged, if it has one."""
    return max(documents)


def _covers(purged: DocumentId, document: DocumentId) -> bool:
    if purged.document_id:
        return purged == document
    return (purged.tenant, purged.collection) == (document.tenant, document.collection)


class ShardMetrics:
    """One shard's metrics; counters advance by what the shard's own counters have grown."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._last = GetKvCacheStatusResponse()

    def record_acquired(self, requests: Sequence[BlockRequest], acquired: Sequence[AcquiredBlock]) -> None:
        """Counts the tokens looked up and found."""
        tokens = Tally[Tier]()
        for request, block in zip(requests, acquired, strict=True):
            tokens[block.tier] += int(request.token_ids.size)
        KV_CACHE_QUERY_TOKENS.inc(tokens.total(), tier="store")
        KV_CACHE_HIT_TOKENS.inc(tokens["store"], tier="store")
        KV_CACHE_QUERY_TOKENS.inc(tokens.total() - tokens["store"], tier="disk")
        KV_CACHE_HIT_TOKENS.inc(tokens["disk"] + tokens["volume"], tier="disk")

    def record_stats(self, stats: GetKvCacheStatusResponse) -> None:
        """Brings gauges and counters up to date."""
        last, self._last = self._last, stats
        KV_CACHE_BYTES.set(stats.bytes, shard=self._shard)
        KV_CACHE_USAGE_PERC.set(stats.bytes / stats.budget_bytes, tier="store")
        KV_CACHE_DISK_BYTES.set(stats.disk.bytes, shard=self._shard)
        if stats.disk.budget_bytes:
            KV_CACHE_USAGE_PERC.set(stats.disk.bytes / stats.disk.budget_bytes, tier="disk")
        for name, counter in _COUNTERS.items():
            counter.inc(getattr(stats, name) - getattr(last, name), shard=self._shard)
        for name, counter in _DISK_COUNTERS.items():
            counter.inc(getattr(stats.disk, name) - getattr(last.disk, name), shard=self._shard)
