"""A shard with a disk below its objects."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockrag.kv_cache.shard import CacheShard
from blockrag.kv_cache.shard_messages import DocumentId, EncodedObject
from blockrag.kv_cache.store import BlockStore
from blockrag.types import BlockForm, BlockRequest
from tests.unit.kv_cache.disk_parts import as_object, assert_same_block, block_of, files, open_tier, wanted
from tests.unit.kv_cache.parts import settle


@dataclass
class Encoder:
    """Makes the block that a request is for, once it may."""

    encoded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.asked = asyncio.Event()

    async def __call__(self, request: BlockRequest) -> EncodedObject:
        self.encoded.append(request.key)
        self.asked.set()
        await asyncio.sleep(0.05)
        await self.go.wait()
        return as_object(block_of(request))


def open_shard(root: Path, encoder: Encoder, *, store_bytes: int = 10**6, blocks: int = 100) -> CacheShard:
    return CacheShard(BlockStore(store_bytes), encoder, disk=open_tier(root, blocks))


async def stop(shard: CacheShard) -> None:
    assert shard.disk is not None
    await shard.disk.settled()


async def test_a_shard_says_where_a_block_is(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder)
    await shard.warm([wanted(1)], False)
    assert await shard.locate([wanted(1).key, wanted(2).key]) == ["store", "encoded"]
    await stop(shard)
    again = open_shard(tmp_path, encoder)
    assert await again.locate([wanted(1).key, wanted(2).key]) == ["disk", "encoded"]
    assert (await again.stats()).misses == 0
    await stop(again)


async def test_after_a_restart_a_block_comes_from_disk_and_then_from_the_store(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder)
    requests = [wanted(1), wanted(2, form=BlockForm("compressed", 2)), wanted(3, form=BlockForm("chunks", 2))]
    before = await shard.acquire(requests)
    await stop(shard)
    shard = open_shard(tmp_path, encoder)
    after, again = await shard.acquire(requests), await shard.acquire(requests)
    assert [[block.tier for block in answer] for answer in (before, after, again)] == [
        ["encoded"] * 3,
        ["disk"] * 3,
        ["store"] * 3,
    ]
    for old, new in zip(before, after, strict=True):
        assert_same_block(new.ref[0], old.ref[0])
        assert new.generation > 0
    assert len(encoder.encoded) == 3
    stats = await shard.stats()
    assert (stats.hits, stats.misses, stats.disk.hits, stats.blocks) == (3, 0, 3, 3)


async def test_what_the_store_evicted_is_read_again(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder, store_bytes=as_object(block_of(wanted(1))).nbytes)
    for number in (1, 2):
        await shard.acquire([wanted(number)])
    await stop(shard)
    [block] = await shard.acquire([wanted(1)])
    assert block.tier == "disk"
    assert (await shard.warm([wanted(2)], False)).hits == 1


async def test_the_disk_is_read_once_for_all_who_wait(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder)
    await shard.acquire([wanted(1)])
    await stop(shard)
    shard = open_shard(tmp_path, encoder)
    answers = await asyncio.gather(*(shard.acquire([wanted(1)]) for _ in range(20)))
    assert {block.tier for [block] in answers} == {"disk"}
    assert ((await shard.stats()).disk.hits, (await shard.stats()).joined) == (1, 19)


async def test_a_damaged_file_is_encoded_again_and_written_anew(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder)
    await shard.acquire([wanted(1)])
    await stop(shard)
    [file] = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    shard = open_shard(tmp_path, encoder)
    [block] = await shard.acquire([wanted(1)])
    assert block.tier == "encoded"
    await stop(shard)
    shard = open_shard(tmp_path, encoder)
    [block] = await shard.acquire([wanted(1)])
    assert block.tier == "disk"
    assert_same_block(block.ref[0], block_of(wanted(1)))


async def test_a_purge_forgets_memory_and_disk_and_counts_each_block_once(tmp_path: Path) -> None:
    encoder = Encoder()
    size = as_object(block_of(wanted(1))).nbytes
    shard = open_shard(tmp_path, encoder, store_bytes=2 * size)
    cursor = (await shard.purged_since(0)).cursor
    for number in range(4):
        await shard.acquire([wanted(number)])
    await shard.acquire([wanted(9, "other")])
    await stop(shard)
    document = DocumentId("t", "c", "d")
    assert await shard.purge([document]) == 4
    assert set((await shard.purged_since(cursor)).keys) == {wanted(number).key for number in range(4)}
    assert [file.name for file in files(tmp_path)] == [wanted(9).key]
    shard = open_shard(tmp_path, encoder)
    found = await shard.acquire([wanted(0), wanted(9, "other")])
    assert [block.tier for block in found] == ["encoded", "disk"]


async def test_what_was_purged_while_it_was_encoded_is_not_written(tmp_path: Path) -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = open_shard(tmp_path, encoder)
    waiting = asyncio.ensure_future(shard.acquire([wanted(1)]))
    await settle()
    assert await shard.purge([DocumentId("t", "c", "d")]) == 0
    encoder.go.set()
    [block] = await waiting
    assert_same_block(block.ref[0], block_of(wanted(1)))
    await stop(shard)
    assert files(tmp_path) == []


async def test_a_block_that_was_given_and_is_a_document_s_too_goes_with_the_document(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder)
    await shard.acquire([wanted(1, "", collection="")])
    await shard.acquire([wanted(1)])
    await stop(shard)
    assert await shard.purge([DocumentId("t", "c", "d")]) == 1
    assert files(tmp_path) == []


async def test_a_block_encoded_for_a_document_and_for_none_goes_with_the_document(tmp_path: Path) -> None:
    encoder = Encoder()
    encoder.go.clear()
    shard = open_shard(tmp_path, encoder)
    both = [asyncio.ensure_future(shard.acquire([each])) for each in (wanted(1, "", collection=""), wanted(1))]
    await settle()
    encoder.go.set()
    await asyncio.gather(*both)
    await stop(shard)
    shard = open_shard(tmp_path, encoder)
    assert await shard.purge([DocumentId("t", "c", "d")]) == 1
    assert files(tmp_path) == []


async def test_a_block_knows_what_it_cost_however_many_were_encoded_with_it(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder)
    await shard.acquire([wanted(number) for number in range(10)])
    await stop(shard)
    assert shard.disk is not None
    costs: list[Any] = [shard.disk.index.get(wanted(number).key) for number in range(10)]
    assert all(0.005 <= entry.encode_s < 0.05 for entry in costs), "fifty milliseconds for ten together"


async def test_a_hot_block_whose_file_is_missing_is_written_again(tmp_path: Path) -> None:
    encoder = Encoder()
    shard = open_shard(tmp_path, encoder)
    await shard.acquire([wanted(1)])
    await shard.acquire([wanted(1, "other")])
    await stop(shard)
    await shard.purge([DocumentId("t", "c", "d")])
    assert files(tmp_path) == []
    [block] = await shard.acquire([wanted(1, "other")])
    assert block.tier == "store"
    await stop(shard)
    assert len(files(tmp_path)) == 1
    assert await shard.purge([DocumentId("t", "c", "other")]) == 1
    assert files(tmp_path) == []
