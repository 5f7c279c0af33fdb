from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from blockrag.errors import InvalidRequestError, UnavailableError
from blockrag.kv_cache.shard import ENCODE_ATTEMPTS, CacheShard
from blockrag.kv_cache.shard_messages import DocumentId, WarmOutcome
from blockrag.kv_cache.store import BlockStore
from blockrag.types import BlockForm
from blockrag.v1.kv_cache_pb2 import FormUsage
from tests.unit.kv_cache.parts import SIZE, Encoder, request, requests, settle

DOCUMENT = DocumentId("t", "c", "d")


def make_shard(encoder: Encoder, *, blocks: int = 100, warm_concurrency: int = 8) -> CacheShard:
    return CacheShard(BlockStore(blocks * SIZE), encoder, warm_concurrency=warm_concurrency)


async def test_a_block_is_encoded_once_and_then_held() -> None:
    encoder = Encoder()
    shard = make_shard(encoder)
    [first] = await shard.acquire(requests("a"))
    [second] = await shard.acquire(requests("a"))
    assert (first.tier, second.tier) == ("encoded", "store")
    assert first.ref == second.ref == ["object 1 of a"]
    assert first.generation == second.generation != 0
    assert encoder.encoded == ["a"]


async def test_answers_stand_in_the_order_asked_and_equal_keys_are_one() -> None:
    encoder = Encoder()
    shard = make_shard(encoder)
    await shard.acquire(requests("b"))
    answers = await shard.acquire(requests("cabac"))
    assert [answer.key for answer in answers] == list("cabac")
    assert [answer.tier for answer in answers] == ["encoded", "encoded", "store", "encoded", "encoded"]
    assert sorted(encoder.encoded) == ["a", "b", "c"]


async def test_a_hundred_concurrent_requests_for_one_missing_block_are_one_encode() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)
    waiting = [asyncio.ensure_future(shard.acquire(requests("a"))) for _ in range(100)]
    await settle()
    encoder.go.set()
    answers = await asyncio.gather(*waiting)
    assert encoder.encoded == ["a"]
    assert {answer.ref[0] for [answer] in answers} == {"object 1 of a"}
    stats = await shard.stats()
    assert (stats.hits, stats.misses, stats.joined) == (0, 1, 99)


async def test_requests_that_come_while_an_encode_ends_start_no_other() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)

    async def ask_after(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await shard.acquire(requests("a"))

    async def end_after(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        encoder.go.set()

    # One request in each turn of the event loop around the encode's end, before its end in the turn and after.
    early = [asyncio.ensure_future(ask_after(turns)) for turns in range(30)]
    ending = asyncio.ensure_future(end_after(10))
    late = [asyncio.ensure_future(ask_after(turns)) for turns in range(30)]
    await asyncio.gather(*early, ending, *late)
    assert encoder.encoded == ["a"]
    stats = await shard.stats()
    assert (stats.misses, stats.hits + stats.joined) == (1, 59)


async def test_a_failed_encode_fails_all_who_wait_and_is_not_cached() -> None:
    encoder = Encoder(errors=[InvalidRequestError("token_ids", "no")])
    encoder.go.clear()
    shard = make_shard(encoder)
    waiting = [asyncio.ensure_future(shard.acquire(requests("a"))) for _ in range(3)]
    await settle()
    encoder.go.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [InvalidRequestError] * 3
    assert [key in shard.store for key in ("a",)] == [False]
    [block] = await shard.acquire(requests("a"))
    assert block.tier == "encoded"


async def test_one_bad_block_fails_its_request_and_stops_the_rest_of_it() -> None:
    encoder = Encoder(errors=[InvalidRequestError("token_ids", "no")])
    shard = make_shard(encoder)
    with pytest.raises(InvalidRequestError):
        await shard.acquire(requests("abc"))
    assert encoder.running == 0


async def test_an_encoder_that_dies_is_tried_again_a_few_times() -> None:
    encoder = Encoder(errors=[UnavailableError("gone")] * (ENCODE_ATTEMPTS - 1))
    shard = make_shard(encoder)
    [block] = await shard.acquire(requests("a"))
    assert block.tier == "encoded"
    assert len(encoder.encoded) == ENCODE_ATTEMPTS
    encoder.errors = [UnavailableError("gone")] * ENCODE_ATTEMPTS
    with pytest.raises(UnavailableError):
        await shard.acquire(requests("b"))


async def test_a_request_that_is_cancelled_leaves_the_encode_to_the_others() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)
    leaving = asyncio.ensure_future(shard.acquire(requests("ab")))
    staying = asyncio.ensure_future(shard.acquire(requests("a")))
    await settle()
    leaving.cancel()
    await settle()
    assert encoder.cancelled == 1  # b: nobody else wanted it
    encoder.go.set()
    [block] = await staying
    assert block.key == "a"
    assert [
        key in shard.store
        for key in (
            "a",
            "b",
        )
    ] == [True, False]


async def test_what_was_purged_while_it_was_encoded_is_used_but_not_kept() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)
    cursor = (await shard.purged_since(0)).cursor
    waiting = asyncio.ensure_future(shard.acquire(requests("a")))
    await settle()
    await shard.purge([DOCUMENT])
    assert (await shard.purged_since(cursor)).keys == ["a"]
    encoder.go.set()
    [block] = await waiting
    assert block.ref == ["object 1 of a"]
    assert [key in shard.store for key in ("a",)] == [False]


async def test_a_block_being_encoded_for_another_document_too_is_kept_for_that_one() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)
    both = [asyncio.ensure_future(shard.acquire([request("a", document)])) for document in ("d", "other")]
    await settle()
    await shard.purge([DOCUMENT])
    encoder.go.set()
    await asyncio.gather(*both)
    assert [key in shard.store for key in ("a",)] == [True]
    assert await shard.purge([DOCUMENT]) == 0
    assert await shard.purge([DocumentId("t", "c", "other")]) == 1


async def test_a_document_that_comes_back_during_the_encode_keeps_its_block() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)
    before = asyncio.ensure_future(shard.acquire(requests("a")))
    await settle()
    await shard.purge([DocumentId("t", "c", "")])
    after = asyncio.ensure_future(shard.acquire(requests("a")))
    await settle()
    encoder.go.set()
    await asyncio.gather(before, after)
    assert [key in shard.store for key in ("a",)] == [True]
    assert encoder.encoded == ["a"]


async def test_warming_encodes_a_bounded_number_at_a_time() -> None:
    encoder = Encoder()
    shard = make_shard(encoder, blocks=1000, warm_concurrency=8)
    blocks = [request(f"k{number}") for number in range(300)]
    first, second = await asyncio.gather(shard.warm(blocks, False), shard.warm(blocks, False))
    assert encoder.most_running == 8
    assert len(encoder.encoded) == 300
    assert first + second == WarmOutcome(300, frozenset(encoder.encoded), 300 * SIZE)


async def test_warming_leaves_the_way_free_for_requests() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder, warm_concurrency=2)
    warming = asyncio.ensure_future(shard.warm(requests("abcdef"), False))
    await settle()
    asking = asyncio.ensure_future(shard.acquire(requests("z")))
    await settle()
    assert encoder.encoded == ["a", "b", "z"]
    encoder.go.set()
    await asyncio.gather(warming, asking)


async def test_warming_pins_what_is_held_already_and_what_it_encodes() -> None:
    shard = make_shard(Encoder())
    await shard.acquire(requests("a"))
    outcome = await shard.warm(requests("aab"), True)
    assert outcome == WarmOutcome(1, frozenset("b"), SIZE)
    assert (await shard.stats()).pinned_blocks == 2
    assert await shard.set_pins([DOCUMENT], False) == 2
    assert (await shard.stats()).pinned_blocks == 0


async def test_warming_pins_a_block_that_a_request_is_having_encoded() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)
    asking = asyncio.ensure_future(shard.acquire(requests("a")))
    await settle()
    warming = asyncio.ensure_future(shard.warm(requests("a"), True))
    await settle()
    encoder.go.set()
    await asking
    assert (await warming).hits == 1
    assert (await shard.stats()).pinned_blocks == 1


async def test_warming_says_when_the_budget_is_too_small() -> None:
    assert (await make_shard(Encoder(), blocks=3).warm(requests("abcde"), False)).over_budget
    shard = make_shard(Encoder(), blocks=3)
    assert (await shard.warm(requests("abcde"), True)).over_budget
    assert (await shard.stats()).pinned_blocks == 3
    assert not (await make_shard(Encoder(), blocks=5).warm(requests("abcde"), True)).over_budget


async def test_a_block_without_room_is_handed_out_all_the_same() -> None:
    shard = make_shard(Encoder(), blocks=1)
    await shard.warm(requests("a"), True)
    [block] = await shard.acquire(requests("b"))
    assert block.ref == ["object 2 of b"]
    assert [
        key in shard.store
        for key in (
            "a",
            "b",
        )
    ] == [True, False]


async def test_a_lost_block_is_encoded_again_unless_it_was_already() -> None:
    encoder = Encoder()
    shard = make_shard(encoder)
    [old] = await shard.acquire(requests("a"))
    assert await shard.report_lost(["a"], [old.generation]) == 1
    [new] = await shard.acquire(requests("a"))
    assert (new.tier, new.ref) == ("encoded", ["object 2 of a"])
    assert await shard.report_lost(["a"], [old.generation]) == 0
    assert [key in shard.store for key in ("a",)] == [True]
    assert await shard.report_lost(["a", "unknown"], [0, 0]) == 1
    assert (await shard.stats()).lost == 2


async def test_nothing_is_left_behind_by_requests_that_were_cancelled() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = make_shard(encoder)
    for _ in range(3):
        waiting = [asyncio.ensure_future(shard.acquire(requests("abc"))) for _ in range(4)]
        await settle()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await settle()
    assert (encoder.running, encoder.cancelled) == (0, 9)
    cursor = (await shard.purged_since(0)).cursor
    await shard.purge([DOCUMENT])
    assert (await shard.purged_since(cursor)).keys == []
    encoder.go.set()
    assert [block.tier for block in await shard.acquire(requests("abc"))] == ["encoded"] * 3


async def test_forms_of_a_block_are_counted_and_purged_together() -> None:
    shard = make_shard(Encoder())
    compressed, chunks = BlockForm("compressed", 8), BlockForm("chunks", 8)
    forms = [request("full"), replace(request("small"), form=compressed), replace(request("tiny"), form=chunks)]
    await shard.acquire(forms)
    await shard.acquire(forms[1:2])
    assert list((await shard.stats()).forms) == [
        FormUsage(form="chunks-8", blocks=1, bytes=SIZE, misses=1),
        FormUsage(form="compressed-8", blocks=1, bytes=SIZE, hits=1, misses=1),
        FormUsage(form="full", blocks=1, bytes=SIZE, misses=1),
    ]
    assert ((await shard.stats()).hits, (await shard.stats()).misses) == (1, 3)
    assert await shard.purge([DOCUMENT]) == 3
    assert {usage.form: usage.blocks for usage in (await shard.stats()).forms} == {
        "chunks-8": 0,
        "compressed-8": 0,
        "full": 0,
    }
    assert set((await shard.purged_since((await shard.purged_since(0)).cursor - 3)).keys) == {"full", "small", "tiny"}


async def test_what_was_purged_while_it_waited_to_be_warmed_is_not_encoded() -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = CacheShard(BlockStore(10 * SIZE), encoder, warm_concurrency=1)
    first = asyncio.create_task(shard.warm([request("a")], False))
    await settle()
    waiting = asyncio.create_task(shard.warm([request("b"), request("c", "other")], False))
    await settle()
    await shard.purge([DocumentId("t", "c", "d")])
    encoder.go.set()
    assert await waiting == WarmOutcome(encoded=frozenset("c"), encoded_bytes=SIZE)
    await first
    assert encoder.encoded == ["a", "c"]
    assert "b" not in shard.store and "c" in shard.store


@pytest.mark.parametrize("pinned", [False, True])
async def test_pins_count_that_change_while_blocks_wait_to_be_warmed(pinned: bool) -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = CacheShard(BlockStore(10 * SIZE), encoder, warm_concurrency=1)
    warming = asyncio.create_task(shard.warm([request("a"), request("b"), request("c", "other")], not pinned))
    await settle()
    await shard.set_pins([DOCUMENT], pinned)
    encoder.go.set()
    await warming
    assert (await shard.stats()).pinned_blocks == (2 if pinned else 1)
