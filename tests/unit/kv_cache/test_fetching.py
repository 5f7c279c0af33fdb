from __future__ import annotations

import asyncio

import pytest

from blockrag.errors import DataError, InvalidRequestError, UnavailableError
from blockrag.kv_cache.fetching import LOST_RETRIES, BlockFetcher
from blockrag.kv_cache.shard_messages import DocumentId, WarmOutcome
from blockrag.kv_cache.shards import ShardGroup, owner, patiently, shard_names
from tests.unit.kv_cache.parts import SIZE, Encoder, LocalShard, ObjectStore, eventually, request

KEYS = [f"k{number}" for number in range(40)]
BLOCKS = [request(key) for key in KEYS]


class Cache:
    """Three shards in this process, with a client and a group."""

    def __init__(self, *, patience_s: float = 5.0) -> None:
        self.encoder = Encoder()
        self.shards = [LocalShard(self.encoder) for _ in range(3)]
        self.store = ObjectStore()
        self.group = ShardGroup(self.shards, shard_names(3), patience_s=patience_s)
        self.client = BlockFetcher(self.group, self.store.read)

    def shard_of(self, key: str) -> LocalShard:
        return self.shards[owner(key, self.group.names)]


async def test_blocks_come_in_order_from_their_shards() -> None:
    cache = Cache()
    first = await cache.client.fetch(BLOCKS + BLOCKS[:3])
    assert [fetched.block.key for fetched in first] == KEYS + KEYS[:3]
    assert {fetched.tier for fetched in first} == {"encoded"}
    assert sorted(cache.encoder.encoded) == sorted(KEYS)
    assert all(0 < len(shard.inner.store) < len(KEYS) for shard in cache.shards)
    second = await cache.client.fetch(BLOCKS)
    assert {fetched.tier for fetched in second} == {"store"}
    assert cache.store.reads == 2  # one call for all objects of a request
    assert await cache.client.fetch([]) == []


async def test_a_lost_object_is_encoded_again() -> None:
    cache = Cache()
    await cache.client.fetch(BLOCKS)
    cache.store.lose_next = 2
    fetched = await cache.client.fetch(BLOCKS)
    assert [each.block.key for each in fetched] == KEYS
    assert [each.tier for each in fetched].count("encoded") == 2
    assert len(cache.encoder.encoded) == len(KEYS) + 2
    assert sum(shard.inner.store.lost for shard in cache.shards) == 2


async def test_an_object_that_is_lost_again_and_again_is_an_error() -> None:
    cache = Cache()
    cache.store.lose_next = 1 + LOST_RETRIES
    with pytest.raises(UnavailableError, match=r"k0.*lost"):
        await cache.client.fetch(BLOCKS[:1])
    assert (await cache.client.fetch(BLOCKS[:1]))[0].block.key == "k0"


async def test_an_object_that_is_another_block_is_refused() -> None:
    cache = Cache()
    cache.store.wrong_key = True
    with pytest.raises(DataError, match="another block"):
        await cache.client.fetch(BLOCKS[:1])


async def test_a_shard_that_is_restarted_is_waited_for() -> None:
    cache = Cache()
    await cache.client.fetch(BLOCKS)
    cache.shard_of("k0").die(calls_lost=3)
    fetched = await cache.client.fetch(BLOCKS)
    assert [each.block.key for each in fetched] == KEYS
    assert fetched[0].tier == "encoded"
    assert {each.tier for each in fetched} == {"encoded", "store"}


@pytest.mark.parametrize("silent", [True, False])
async def test_a_shard_that_does_not_come_back_is_named(silent: bool) -> None:
    cache = Cache(patience_s=0.2)
    shard = cache.shard_of("k0")
    shard.silent, shard.unavailable = silent, 10**6
    with pytest.raises(UnavailableError, match=f"^KvCacheShard-{owner('k0', shard_names(3))}: "):
        await cache.client.fetch(BLOCKS)


async def test_what_the_encoder_refuses_is_not_tried_again() -> None:
    cache = Cache()
    cache.encoder.errors = [InvalidRequestError("token_ids", "no")]
    with pytest.raises(InvalidRequestError):
        await cache.client.fetch(BLOCKS[:1])
    assert cache.encoder.encoded == ["k0"]


async def test_a_cancelled_fetch_stops_the_encodes_that_nobody_else_waits_for() -> None:
    cache = Cache()
    cache.encoder.go.clear()
    fetching = asyncio.ensure_future(cache.client.fetch(BLOCKS))
    await eventually(lambda: cache.encoder.running == len(BLOCKS))
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await eventually(lambda: cache.encoder.running == 0)


async def test_purges_of_all_shards_are_polled() -> None:
    cache = Cache()
    first = await cache.client.poll_purges()
    assert first.reset
    await cache.client.fetch(BLOCKS)
    assert await cache.group.purge([DocumentId("t", "c", "d")]) == len(KEYS)
    second = await cache.client.poll_purges()
    assert (sorted(second.keys), second.reset) == (sorted(KEYS), False)
    assert (await cache.client.poll_purges()).keys == []


async def test_a_shard_that_is_away_is_skipped_and_then_asks_for_a_reset() -> None:
    cache = Cache()
    await cache.client.poll_purges()
    await cache.client.fetch(BLOCKS)
    await cache.group.purge([DocumentId("t", "c", "d")])
    cache.shards[0].die(calls_lost=1)
    others = await cache.client.poll_purges()
    assert not others.reset
    assert 0 < len(others.keys) < len(KEYS)
    assert (await cache.client.poll_purges()).reset
    assert not (await cache.client.poll_purges()).reset


async def test_the_group_warms_pins_and_counts_over_all_shards() -> None:
    cache = Cache()
    assert await cache.group.warm(BLOCKS, False) == WarmOutcome(0, frozenset(KEYS), 40 * SIZE)
    assert await cache.group.set_pins([DocumentId("t", "c", "d")], True) == 40
    stats = await cache.group.stats()
    assert sum(each.pinned_blocks for each in stats) == 40
    assert sum(each.misses for each in stats) == 40


async def test_the_group_says_where_blocks_are_and_touches_none() -> None:
    cache = Cache()
    await cache.group.warm(BLOCKS[::2], False)
    assert await cache.group.locate(KEYS, 1.0) == ["store", "encoded"] * 20
    assert await cache.group.locate([], 1.0) == []
    stats = await cache.group.stats()
    assert sum(each.hits for each in stats) == 0
    assert sum(each.misses for each in stats) == 20


@pytest.mark.parametrize("silent", [False, True])
async def test_what_a_shard_holds_that_does_not_say_so_in_time_is_taken_for_held(silent: bool) -> None:
    cache = Cache()
    cache.shards[1].unavailable, cache.shards[1].silent = int(not silent), silent
    places = cache.group.places(KEYS)[1]
    found = await cache.group.locate(KEYS, 0.05)
    assert [place for place, tier in enumerate(found) if tier == "store"] == places
    assert set(found) == {"store", "encoded"}


async def test_stats_leave_out_a_shard_that_does_not_answer() -> None:
    cache = Cache()
    cache.shards[1].unavailable = 1
    assert len(await cache.group.stats()) == 2


async def test_a_purge_waits_for_a_shard_that_is_restarted() -> None:
    cache = Cache()
    await cache.client.fetch(BLOCKS)
    cache.shards[2].die(calls_lost=2)
    purged = await cache.group.purge([DocumentId("t", "c", "d")])
    assert 0 < purged < len(KEYS)
    assert cache.shards[2].calls.count("purge") == 3


async def test_patience_passes_other_errors_on_at_once() -> None:
    calls = 0

    async def refuse() -> None:
        nonlocal calls
        calls += 1
        raise InvalidRequestError("x", "no")

    with pytest.raises(InvalidRequestError):
        await patiently("shard", refuse, 5.0)
    assert calls == 1
