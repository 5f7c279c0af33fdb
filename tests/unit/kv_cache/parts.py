"""Hand-written parts for the cache's tests: an encoder that waits for its cue, blocks, shards in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blockrag.errors import UnavailableError
from blockrag.kv_cache.shard import CacheShard
from blockrag.kv_cache.shard_messages import (
    AcquiredBlock,
    DocumentId,
    EncodedObject,
    PurgeLog,
    Tier,
    WarmOutcome,
)
from blockrag.kv_cache.store import BlockStore
from blockrag.types import BlockKV, BlockRequest
from blockrag.v1.kv_cache_pb2 import GetKvCacheStatusResponse

SIZE = 100
"""Bytes of every block."""


def request(key: str, document_id: str = "d", *, tenant: str = "t", collection: str = "c") -> BlockRequest:
    return BlockRequest(
        key=key, token_ids=np.arange(3, dtype=np.int32), tenant=tenant, collection=collection, document_id=document_id
    )


def requests(keys: str) -> list[BlockRequest]:
    return [request(key) for key in keys]


@dataclass
class Encoder:
    """Stands for the encoder pool: counts, and waits for ``go``."""

    errors: list[Exception] = field(default_factory=list)
    """Raised one after another, before any block is encoded."""
    encoded: list[str] = field(default_factory=list)
    """Keys in the order they were asked for."""
    running: int = 0
    most_running: int = 0
    cancelled: int = 0

    def __post_init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, wanted: BlockRequest) -> EncodedObject:
        self.encoded.append(wanted.key)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0)
            await self.go.wait()
            if self.errors:
                raise self.errors.pop(0)
            return EncodedObject(f"object {len(self.encoded)} of {wanted.key}", SIZE)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class LocalShard:
    """A shard in this process that can die: it then forgets everything, as a new process does."""

    def __init__(self, encode: Encoder, *, blocks: int = 1000) -> None:
        self._make: Callable[[], CacheShard] = lambda: CacheShard(BlockStore(blocks * SIZE), encode)
        self.inner = self._make()
        self.unavailable = 0
        """How many of the next calls fail."""
        self.silent = False
        """Calls never return."""
        self.calls: list[str] = []

    def die(self, *, calls_lost: int) -> None:
        self.inner = self._make()
        self.unavailable = calls_lost

    async def _alive(self, method: str) -> CacheShard:
        self.calls.append(method)
        if self.silent:
            await asyncio.Event().wait()
        if self.unavailable:
            self.unavailable -= 1
            raise UnavailableError("the replica went away")
        return self.inner

    async def acquire(self, blocks: list[BlockRequest]) -> list[AcquiredBlock]:
        return await (await self._alive("acquire")).acquire(blocks)

    async def locate(self, keys: list[str]) -> list[Tier]:
        return await (await self._alive("locate")).locate(keys)

    async def warm(self, blocks: list[BlockRequest], pin: bool) -> WarmOutcome:
        return await (await self._alive("warm")).warm(blocks, pin)

    async def report_lost(self, keys: list[str], generations: list[int]) -> int:
        return await (await self._alive("report_lost")).report_lost(keys, generations)

    async def purged_since(self, cursor: int) -> PurgeLog:
        return await (await self._alive("purged_since")).purged_since(cursor)

    async def set_pins(self, documents: list[DocumentId], pinned: bool) -> int:
        return await (await self._alive("set_pins")).set_pins(documents, pinned)

    async def purge(self, documents: list[DocumentId]) -> int:
        return await (await self._alive("purge")).purge(documents)

    async def stats(self) -> GetKvCacheStatusResponse:
        return await (await self._alive("stats")).stats()


class ObjectStore:
    """Reads the references that ``Encoder`` hands out; loses objects when told to."""

    def __init__(self) -> None:
        self.lose_next = 0
        self.reads = 0
        self.wrong_key = False

    async def read(self, refs: list[Any], timeout_s: float) -> list[BlockKV | None]:
        self.reads += 1
        return [self._read(ref) for ref in refs]

    def _read(self, ref: str) -> BlockKV | None:
        if self.lose_next:
            self.lose_next -= 1
            return None
        zeros = np.zeros((1, 1, 3, 2), dtype=np.float32)
        key = "another" if self.wrong_key else ref.split()[-1]
        return BlockKV(key, np.arange(3, dtype=np.int32), zeros, zeros)


async def settle() -> None:
    """Lets everything run that can run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Returns when the condition holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
