"""Blocks that encoders die of."""

from __future__ import annotations

import asyncio

import pytest

from blockrag.errors import DataError, ReplicaLostError, UnavailableError
from blockrag.kv_cache.shard import CacheShard
from blockrag.kv_cache.store import BlockStore
from blockrag.kv_cache.suspects import QUARANTINE_S, Suspects
from blockrag.types import BlockRequest
from tests.unit.kv_cache.parts import SIZE, EncodedObject, requests


class Pool:
    """Encoders that die with everything they hold when a poisoned block is among it."""

    def __init__(self, poison: str) -> None:
        self.poison = poison
        self.deaths: list[set[str]] = []
        self._held: dict[str, asyncio.Future[EncodedObject]] = {}

    async def __call__(self, request: BlockRequest) -> EncodedObject:
        loop = asyncio.get_running_loop()
        future = self._held[request.key] = loop.create_future()
        if len(self._held) == 1:
            loop.call_later(0.01, self._forward)
        return await future

    def _forward(self) -> None:
        held, self._held = self._held, {}
        dies = self.poison in held
        if dies:
            self.deaths.append(set(held))
        for key, future in held.items():
            if dies:
                future.set_exception(ReplicaLostError("encoder: gone"))
            else:
                future.set_result(EncodedObject(f"object of {key}", SIZE))


async def test_what_two_encoders_died_of_is_held_back_and_its_neighbours_are_encoded() -> None:
    pool = Pool("x")
    shard = CacheShard(BlockStore(100 * SIZE), pool)
    outcomes = await asyncio.gather(*(shard.acquire(requests(key)) for key in "abxcd"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [list, list, DataError, list, list]
    assert pool.deaths == [set("abxcd"), {"x"}]
    with pytest.raises(DataError, match="2 encoders"):
        await shard.acquire(requests("x"))
    assert len(pool.deaths) == 2


async def test_a_quarantine_ends_and_an_encoder_that_cannot_be_reached_is_no_strike() -> None:
    now = 0.0
    suspects = Suspects(lambda: now)
    for _ in range(5):
        with pytest.raises(UnavailableError):
            async with suspects.tried("a"):
                raise UnavailableError("encoder: still starting")
    for _ in range(2):
        with pytest.raises(ReplicaLostError):
            async with suspects.tried("a"):
                raise ReplicaLostError("encoder: gone")
    with pytest.raises(DataError):
        async with suspects.tried("a"):
            pass
    now = QUARANTINE_S
    async with suspects.tried("a"):
        pass
