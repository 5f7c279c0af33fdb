"""All shards of a cache together: which one a key belongs to, patience with one that is being restarted."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from blockrag.aio import gather_or_cancel
from blockrag.errors import BlockragError, UnavailableError
from blockrag.kv_cache.shard_messages import AcquiredBlock, DocumentId, PurgeLog, Tier, WarmOutcome
from blockrag.types import BlockRequest
from blockrag.v1.kv_cache_pb2 import GetKvCacheStatusResponse

PATIENCE_S = 60.0
"""How long a call waits for a shard that is being restarted; a caller's deadline usually ends it sooner."""
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 1.0
_STATS_TIMEOUT_S = 2.0

T = TypeVar("T")


class Shard(Protocol):
    """A ``CacheShard`` as its callers see it. Every method raises ``UnavailableError`` when the shard is gone."""

    async def acquire(self, blocks: list[BlockRequest]) -> list[AcquiredBlock]: ...

    async def locate(self, keys: list[str]) -> list[Tier]: ...

    async def warm(self, blocks: list[BlockRequest], pin: bool) -> WarmOutcome: ...

    async def report_lost(self, keys: list[str], generations: list[int]) -> int: ...

    async def purged_since(self, cursor: int) -> PurgeLog: ...

    async def set_pins(self, documents: list[DocumentId], pinned: bool) -> int: ...

    async def purge(self, documents: list[DocumentId]) -> int: ...

    async def stats(self) -> GetKvCacheStatusResponse: ...


def shard_names(shards: int) -> list[str]:
    """Names of the shards' deployments."""
    return [f"KvCacheShard-{index}" for index in range(shards)]


def owner(key: str, names: Sequence[str]) -> int:
    """Index of the name that a key belongs to, by rendezvous hashing: the one with the greatest hash together with it.

    Equal in every process, and a further name takes its share of the keys and moves no other.
    """
    hashes = [hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest() for name in names]
    return max(range(len(names)), key=lambda index: (hashes[index], names[index]))


async def patiently(name: str, call: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """The call's result; while it raises ``UnavailableError`` it is made again, with growing pauses.

    Raises ``UnavailableError`` naming the shard when ``patience_s`` is over, also in the middle of a call.
    """
    backoff_s = _FIRST_BACKOFF_S
    reason = f"no answer within {patience_s:g} s"
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while True:
                try:
                    return await call()
                except UnavailableError as error:
                    reason = str(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
    raise UnavailableError(reason if reason.startswith(name) else f"{name}: {reason}")


class ShardGroup:
    """Calls that concern several shards. What one shard cannot do in time is an ``UnavailableError`` naming it."""

    def __init__(self, shards: Sequence[Shard], names: Sequence[str], *, patience_s: float = PATIENCE_S) -> None:
        if not names or len(shards) != len(names) or len(set(names)) != len(names):
            raise ValueError(f"{len(shards)} shards with the names {', '.join(names)}: one or more, each its own name")
        self.shards = tuple(shards)
        self.names = tuple(names)
        self.patience_s = patience_s

    def places(self, keys: Sequence[str]) -> dict[int, list[int]]:
        """By shard, the places of its keys in ``keys``."""
        groups: dict[int, list[int]] = {}
        for place, key in enumerate(keys):
            groups.setdefault(owner(key, self.names), []).append(place)
        return groups

    async def locate(self, keys: Sequence[str], within_s: float) -> list[Tier]:
        """Where each block would come from now; what a shard holds that does not answer in time is taken for held."""
        tiers: list[Tier] = ["store"] * len(keys)

        async def ask(index: int, places: list[int]) -> None:
            try:
                async with asyncio.timeout(within_s):
                    found = await self.shards[index].locate([keys[place] for place in places])
            except (BlockragError, TimeoutError):
                return
            for place, tier in zip(places, found, strict=True):
                tiers[place] = tier

        await gather_or_cancel([ask(index, places) for index, places in self.places(keys).items()])
        return tiers

    async def warm(self, blocks: Sequence[BlockRequest], pin: bool) -> WarmOutcome:
        """Has blocks held ahead of time; takes as long as encoding them takes."""
        groups = self.places([block.key for block in blocks])
        outcomes = await gather_or_cancel(
            [self.shards[index].warm([blocks[place] for place in places], pin) for index, places in groups.items()]
        )
        return sum(outcomes, WarmOutcome())

    async def set_pins(self, documents: list[DocumentId], pinned: bool) -> int:
        """Pins or unpins documents' blocks; how many changed."""
        return sum(await self._call_all(lambda shard: shard.set_pins(documents, pinned)))

    async def purge(self, documents: list[DocumentId]) -> int:
        """Forgets documents' blocks in every shard; how many.

        A shard that died meanwhile is asked again once it is back: it holds nothing then, and the decoders have been
        told to forget everything they had from it.
        """
        return sum(await self._call_all(lambda shard: shard.purge(documents)))

    async def stats(self) -> list[GetKvCacheStatusResponse]:
        """Of the shards that answer within two seconds."""

        async def ask(shard: Shard) -> GetKvCacheStatusResponse | None:
            try:
                async with asyncio.timeout(_STATS_TIMEOUT_S):
                    return await shard.stats()
            except (TimeoutError, BlockragError):
                return None

        answers = await gather_or_cancel([ask(shard) for shard in self.shards])
        return [answer for answer in answers if answer is not None]

    async def _call_all(self, call: Callable[[Shard], Awaitable[T]]) -> list[T]:
        named = zip(self.names, self.shards, strict=True)
        return await gather_or_cancel([patiently(name, partial(call, shard), self.patience_s) for name, shard in named])
