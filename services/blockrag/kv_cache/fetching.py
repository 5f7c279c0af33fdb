"""Blocks out of the cluster's cache, for whoever computes with them.

Asks each key's shard for a reference and reads all objects at once, zero-copy. Nothing here imports Ray: shards and
the reading of objects are given. What a reader keeps for itself forgets changed and deleted documents too, by
``follow_purges``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from blockrag.aio import gather_or_cancel
from blockrag.errors import DataError, UnavailableError
from blockrag.kv_cache.shard_messages import AcquiredBlock, FetchedBlock, PurgeLog, Tier
from blockrag.kv_cache.shards import ShardGroup, patiently
from blockrag.types import BlockRequest, CachedBlock

LOST_RETRIES = 2
"""How often an object that cannot be read is asked for again."""

LOCATE_S = 0.2

PURGE_PERIOD_S = 1.0
"""How often purges are asked for."""

ReadObjects = Callable[[list[Any], float], Awaitable[list[CachedBlock | None]]]
"""Reads the objects of references within so many seconds, in order; None for one that is lost or late."""

_logger = logging.getLogger(__name__)


class BlockFetcher:
    """Another service's way to the cache: a ``BlockSource``."""

    def __init__(self, shards: ShardGroup, read_objects: ReadObjects) -> None:
        self._shards = shards
        self._read_objects = read_objects
        self._cursors = [0] * len(shards.shards)

    async def fetch(self, requests: Sequence[BlockRequest]) -> list[FetchedBlock]:
        """The blocks, in the order asked; what no shard holds is encoded. Equal keys are fetched once.

        An object that was lost is reported and asked for again. Raises ``UnavailableError`` naming the shard that did
        not come back in time, or the block that was lost again and again; ``InvalidRequestError`` for tokens that the
        encoder refuses; ``DataError`` for an object that is not the block asked for.
        """
        give_up = time.monotonic() + self._shards.patience_s
        wanted = {request.key: request for request in requests}
        blocks: dict[str, FetchedBlock] = {}
        for _ in range(1 + LOST_RETRIES):
            missing = [request for key, request in wanted.items() if key not in blocks]
            acquired = await self._acquire(missing, give_up)
            found = await self._read_objects([block.ref[0] for block in acquired], _left(give_up))
            lost = []
            for handed, block in zip(acquired, found, strict=True):
                if block is None:
                    lost.append(handed)
                else:
                    _check(block, wanted[handed.key])
                    blocks[handed.key] = FetchedBlock(block, handed.tier)
            if not lost:
                return [blocks[request.key] for request in requests]
            await self._report_lost(lost)
        raise UnavailableError(f"block {lost[0].key}: its object was lost {1 + LOST_RETRIES} times in a row")

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        """Where each block would come from now; what is not told at once is taken for held."""
        return await self._shards.locate(keys, LOCATE_S)

    async def poll_purges(self) -> PurgeLog:
        """Keys purged since the last call, over all shards; the first call gives ``reset``.

        A shard that does not answer is left for the next call: when it was restarted, it will ask for a reset.
        """
        answers = await asyncio.gather(*map(self._purged_since, range(len(self._cursors))))
        heard = [answer for answer in answers if answer is not None]
        keys = [key for answer in heard for key in answer.keys]
        return PurgeLog(sum(self._cursors), keys, reset=any(answer.reset for answer in heard))

    async def _purged_since(self, index: int) -> PurgeLog | None:
        try:
            answer = await self._shards.shards[index].purged_since(self._cursors[index])
        except Exception as error:
            if not isinstance(error, UnavailableError):
                _logger.exception("a shard was not asked for its purges; it is tried again")
            return None
        self._cursors[index] = answer.cursor
        return answer

    async def _acquire(self, requests: Sequence[BlockRequest], give_up: float) -> list[AcquiredBlock]:
        group = self._shards

        async def acquire(index: int, places: list[int]) -> list[AcquiredBlock]:
            mine = [requests[place] for place in places]
            return await patiently(group.names[index], lambda: group.shards[index].acquire(mine), _left(give_up))

        by_shard = group.places([request.key for request in requests])
        answers = await gather_or_cancel([acquire(index, places) for index, places in by_shard.items()])
        return [block for answer in answers for block in answer]

    async def _report_lost(self, lost: Sequence[AcquiredBlock]) -> None:
        for index, places in self._shards.places([block.key for block in lost]).items():
            keys, generations = [lost[place].key for place in places], [lost[place].generation for place in places]
            with suppress(UnavailableError):  # a shard that is gone has lost the block anyway
                await self._shards.shards[index].report_lost(keys, generations)


class Purgeable(Protocol):
    """Copies of blocks by key, those on their way included."""

    def purge(self, keys: Iterable[str]) -> None:
        """Forget some."""
        ...

    def clear(self) -> None:
        """Forget all."""
        ...


async def follow_purges(
    source: BlockFetcher, copies: Purgeable, then: Callable[[], None] | None = None, *, period_s: float = PURGE_PERIOD_S
) -> None:
    """Have ``copies`` forget what was purged, each ``period_s`` seconds and until it is cancelled.

    ``then`` is called after each time. What fails is logged and tried again.
    """
    while True:
        await asyncio.sleep(period_s)
        try:
            purged = await source.poll_purges()
            if purged.reset:
                copies.clear()
            elif purged.keys:
                copies.purge(purged.keys)
        except Exception:
            _logger.exception("asking for purges failed; it is tried again")
        if then is not None:
            try:
                then()
            except Exception:
                _logger.exception("upkeep failed; it is tried again")


def _left(give_up: float) -> float:
    return max(0.0, give_up - time.monotonic())


def _check(block: CachedBlock, request: BlockRequest) -> None:
    if block.key != request.key or not np.array_equal(block.token_ids, request.token_ids):
        raise DataError(f"block {request.key}: the cache answered with another block")
