from __future__ import annotations

import asyncio

import pytest

from blockrag.decoder.block_loading import BlockLoader, EncodingBlockSource
from blockrag.decoder.l1 import L1Cache
from blockrag.errors import DataError, UnavailableError
from blockrag.kv_cache.shard_messages import FetchedBlock
from blockrag.modeling.model import SlotModel
from blockrag.types import BlockKV, BlockRequest
from tests.models import make_tiny_model
from tests.unit.decoder.fakes import FakeBlock, FakeSource, block_kv, block_request, until


def _resident(block: BlockKV) -> FakeBlock:
    return FakeBlock(block.key, block.num_slots, block.nbytes)


def _loader(source: FakeSource, budget: int = 10_000) -> tuple[BlockLoader, L1Cache]:
    l1 = L1Cache(budget, 60)
    return BlockLoader(l1, source, _resident), l1  # type: ignore[arg-type]


async def test_blocks_come_in_order_and_are_counted_by_tier() -> None:
    source = FakeSource("store")
    loader, l1 = _loader(source)
    loader.release(await loader.load([block_request("b", 3)]))
    loaded = await loader.load([block_request("a", 5), block_request("b", 3), block_request("c", 2)])
    assert [block.key for block in loaded.blocks] == ["a", "b", "c"]
    assert loaded.tiers == ("store", "l1", "store")
    assert source.calls == [["b"], ["a", "c"]]
    assert l1.stats().pinned_blocks == 3
    loader.release(loaded)
    assert l1.stats().pinned_blocks == 0


async def test_where_blocks_are_is_told_without_touching_them() -> None:
    source = FakeSource("disk")
    loader, l1 = _loader(source)
    loader.release(await loader.load([block_request("a")]))
    before = l1.stats()
    assert await loader.locate(["a", "b", "a", "c"]) == ["l1", "disk", "l1", "disk"]
    assert await loader.locate(["a"]) == ["l1"]
    assert l1.stats() == before and source.calls == [["a"]]


async def test_blocks_in_memory_do_not_give_up_the_loop() -> None:
    loader, _ = _loader(FakeSource())
    loader.release(await loader.load([block_request("a")]))
    coroutine = loader.load([block_request("a"), block_request("a")])
    with pytest.raises(StopIteration) as finished:
        coroutine.send(None)
    assert len(finished.value.value.entries) == 2


async def test_a_block_wanted_by_many_is_fetched_once() -> None:
    source = FakeSource("encoded")
    loader, l1 = _loader(source)
    source.gate.clear()
    waiting = [asyncio.ensure_future(loader.load([block_request("a")])) for _ in range(20)]
    overlapping = asyncio.ensure_future(loader.load([block_request("a"), block_request("b")]))
    await until(lambda: len(source.calls) == 2)
    source.gate.set()
    loaded = [*await asyncio.gather(*waiting), await overlapping]
    assert source.calls == [["a"], ["b"]]
    assert len({id(item.blocks[0]) for item in loaded}) == 1
    assert all(item.tiers == ("encoded",) * len(item.entries) for item in loaded)
    for item in loaded:
        loader.release(item)
    assert l1.stats().pinned_blocks == 0


async def test_one_that_leaves_does_not_disturb_the_others() -> None:
    source = FakeSource()
    loader, _ = _loader(source)
    source.gate.clear()
    leaving, staying = (asyncio.ensure_future(loader.load([block_request("a")])) for _ in range(2))
    await until(lambda: bool(source.calls))
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    source.gate.set()
    assert (await staying).blocks[0].key == "a"


async def test_a_fetch_that_nobody_waits_for_is_cancelled_and_its_pins_are_dropped() -> None:
    source = FakeSource()
    loader, l1 = _loader(source)
    loader.release(await loader.load([block_request("held")]))
    source.gate.clear()
    loading = asyncio.ensure_future(loader.load([block_request("held"), block_request("a")]))
    await until(lambda: len(source.calls) == 2)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await until(lambda: source.cancelled == 1)
    assert l1.stats().pinned_blocks == 0
    source.gate.set()
    assert (await loader.load([block_request("a")])).blocks[0].key == "a"


async def test_an_error_reaches_all_who_wait_and_the_next_one_tries_again() -> None:
    source = FakeSource()
    loader, l1 = _loader(source)
    source.error = UnavailableError("kv_cache")
    results = await asyncio.gather(*(loader.load([block_request("a")]) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, UnavailableError) for result in results)
    source.error = None
    assert (await loader.load([block_request("a")])).tiers == ("store",)
    assert l1.stats().pinned_blocks == 1


async def test_a_source_that_gives_up_is_no_cancellation_of_ours() -> None:
    class GivesUp(FakeSource):
        async def fetch(self, requests: list[BlockRequest]) -> list[FetchedBlock]:
            raise asyncio.CancelledError

    loader, _ = _loader(GivesUp())
    with pytest.raises(UnavailableError):
        await loader.load([block_request("a")])


async def test_a_wrong_block_is_refused() -> None:
    class Confused(FakeSource):
        async def fetch(self, requests: list[BlockRequest]) -> list[FetchedBlock]:
            return [FetchedBlock(block_kv(requests[0].key, 9), "store")]

    loader, _ = _loader(Confused())
    with pytest.raises(DataError):
        await loader.load([block_request("a", 4)])


async def test_a_purge_also_forgets_what_is_on_its_way() -> None:
    source = FakeSource()
    loader, l1 = _loader(source)
    source.gate.clear()
    loading = asyncio.ensure_future(loader.load([block_request("a"), block_request("b")]))
    await until(lambda: bool(source.calls))
    loader.purge(["a"])
    source.gate.set()
    loaded = await loading
    assert [block.key for block in loaded.blocks] == ["a", "b"]
    assert l1.acquire(["a"]) == [None]
    loader.release(loaded)
    await loader.load([block_request("a"), block_request("b")])
    assert source.calls == [["a", "b"], ["a"]]


async def test_clear_forgets_what_is_held_and_on_its_way() -> None:
    source = FakeSource()
    loader, l1 = _loader(source)
    loader.release(await loader.load([block_request("a")]))
    source.gate.clear()
    loading = asyncio.ensure_future(loader.load([block_request("b")]))
    await until(lambda: len(source.calls) == 2)
    loader.clear()
    source.gate.set()
    loader.release(await loading)
    assert (l1.stats().blocks, l1.stats().bytes) == (0, 0)


async def test_encoding_in_this_process_gives_the_models_blocks() -> None:
    model = SlotModel.from_pretrained_model(make_tiny_model())
    loader = BlockLoader(L1Cache(2**20, 60), EncodingBlockSource(model), model.to_resident)
    request = BlockRequest("k", block_request("k").token_ids + 7, "public")
    loaded = await loader.load([request])
    assert loaded.tiers == ("encoded",)
    (expected,) = model.encode([[7, 7, 7, 7]], ["k"])
    assert loaded.blocks[0].values.numpy() == pytest.approx(expected.values, abs=1e-6)


async def test_a_prompt_after_a_purge_fetches_anew_and_keeps_what_it_gets() -> None:
    source = FakeSource()
    loader, l1 = _loader(source)
    source.gate.clear()
    before = asyncio.ensure_future(loader.load([block_request("a")]))
    await until(lambda: bool(source.calls))
    loader.purge(["a"])
    after = asyncio.ensure_future(loader.load([block_request("a")]))
    await until(lambda: len(source.calls) == 2)
    source.gate.set()
    old, new = await asyncio.gather(before, after)
    loader.release(old)
    loader.release(new)
    assert l1.acquire(["a"]) == [new.entries[0]]
