from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from torch import Tensor

from blockrag.compressor.mixing import EmbeddingCache
from blockrag.errors import DataError, UnavailableError
from blockrag.kv_cache.shard_messages import FetchedBlock
from blockrag.types import BlockForm, BlockRequest, ChunkEmbeddings
from tests.unit.kv_cache.parts import settle

FORM = BlockForm("chunks", 4)
WIDTH = 8
SIZE = 2 * WIDTH * 4
"""Bytes of the embeddings of a block of two chunks."""


class Source:
    """Answers with the key's code in every number; waits for ``gate``."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.chunks = 2

    async def fetch(self, requests: Sequence[BlockRequest]) -> list[FetchedBlock]:
        self.calls.append([request.key for request in requests])
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [FetchedBlock(self._block(request), "store") for request in requests]

    def _block(self, request: BlockRequest) -> ChunkEmbeddings:
        array = np.full((self.chunks, WIDTH), ord(request.key), dtype=np.float32)
        array.flags.writeable = False
        return ChunkEmbeddings(request.key, request.token_ids, array)


async def get(cache: EmbeddingCache, keys: str) -> list[Tensor]:
    def wanted(place: int) -> BlockRequest:
        return BlockRequest(keys[place], np.arange(7, dtype=np.int32), "t", form=FORM)

    return await cache.get(list(keys), wanted)


async def test_what_is_here_is_not_fetched_again() -> None:
    source = Source()
    cache = EmbeddingCache(source, 10 * SIZE)
    first = await get(cache, "aba")
    second = await get(cache, "bca")
    assert source.calls == [["a", "b"], ["c"]]
    assert [int(each[0, 0]) for each in first] == [ord(key) for key in "aba"]
    assert [int(each[1, 7]) for each in second] == [ord(key) for key in "bca"]
    assert cache.nbytes == 3 * SIZE


async def test_when_all_are_here_the_loop_is_not_given_up() -> None:
    cache = EmbeddingCache(Source(), 10 * SIZE)
    await get(cache, "ab")
    with pytest.raises(StopIteration):
        get(cache, "ba").send(None)


async def test_the_least_recently_used_go_first() -> None:
    source = Source()
    cache = EmbeddingCache(source, 2 * SIZE)
    for keys in ("a", "b", "a", "c", "a", "b"):
        await get(cache, keys)
    assert source.calls == [["a"], ["b"], ["c"], ["b"]]
    assert cache.nbytes == 2 * SIZE


async def test_more_than_the_budget_is_given_and_not_kept() -> None:
    cache = EmbeddingCache(Source(), SIZE - 1)
    assert len(await get(cache, "abc")) == 3
    assert cache.nbytes == 0


@pytest.mark.parametrize("clear", [False, True])
async def test_what_is_purged_on_its_way_is_used_once_and_not_kept(clear: bool) -> None:
    source = Source()
    cache = EmbeddingCache(source, 10 * SIZE)
    await get(cache, "x")
    source.gate.clear()
    getting = asyncio.ensure_future(get(cache, "ab"))
    await settle()
    assert len(source.calls) == 2
    if clear:
        cache.clear()
    else:
        cache.purge(["a", "x", "unknown"])
    source.gate.set()
    assert len(await getting) == 2
    await get(cache, "xab")
    assert source.calls[2] == (["x", "a", "b"] if clear else ["x", "a"])
    assert cache.nbytes == 3 * SIZE


async def test_two_plans_at_a_time_keep_one_copy() -> None:
    source = Source()
    cache = EmbeddingCache(source, 10 * SIZE)
    source.gate.clear()
    both = asyncio.gather(get(cache, "a"), get(cache, "a"))
    await settle()
    assert len(source.calls) == 2
    source.gate.set()
    await both
    assert cache.nbytes == SIZE


async def test_errors_of_the_source_reach_the_plan_and_leave_nothing() -> None:
    source = Source()
    source.error = UnavailableError("kv_cache: gone")
    cache = EmbeddingCache(source, 10 * SIZE)
    with pytest.raises(UnavailableError):
        await get(cache, "a")
    source.error, source.chunks = None, 3
    with pytest.raises(DataError, match="another block"):
        await get(cache, "a")
    assert cache.nbytes == 0
