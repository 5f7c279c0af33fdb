"""A shard with a volume below its objects, with and without a disk between them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import UnavailableError
from blockrag.kv_cache import file_tier, volume_tier
from blockrag.kv_cache.shard import CacheShard
from blockrag.kv_cache.shard_messages import DocumentId
from blockrag.kv_cache.store import BlockStore
from blockrag.kv_cache.volume import Volume
from blockrag.types import BlockForm
from tests.unit.kv_cache.disk_parts import assert_same_block, block_of, files, open_tier, wanted
from tests.unit.kv_cache.parts import settle
from tests.unit.kv_cache.test_shard_disk import Encoder
from tests.unit.kv_cache.volume_parts import HangingVolume, open_volume_tier, stored

DOCUMENT = DocumentId("t", "c", "d")


class Node:
    """A shard on a machine of its own."""

    def __init__(self, volume: str | Volume, disk: Path | None = None) -> None:
        self.encoder = Encoder()
        self.disk = None if disk is None else open_tier(disk)
        self.volume = open_volume_tier(volume)
        self.shard = CacheShard(BlockStore(10**6), self.encoder, disk=self.disk, volume=self.volume)

    async def tiers(self, *requests: Any) -> list[str]:
        found = await self.shard.acquire(requests)
        for block, request in zip(found, requests, strict=True):
            assert_same_block(block.ref[0], block_of(request))
        for tier in (self.disk, self.volume):
            if tier is not None:
                await tier.settled()
        return [block.tier for block in found]


async def test_what_one_node_encoded_another_reads_and_keeps_on_its_disk(url: str, tmp_path: Path) -> None:
    requests = [wanted(1), wanted(2, form=BlockForm("compressed", 2)), wanted(3, form=BlockForm("chunks", 2))]
    first, second = Node(url, tmp_path / "first"), Node(url, tmp_path / "second")
    assert await first.tiers(*requests) == ["encoded"] * 3
    assert await second.tiers(*requests) == ["volume"] * 3
    assert await second.tiers(*requests) == ["store"] * 3
    assert second.encoder.encoded == []
    assert len(files(tmp_path / "second")) == len(files(tmp_path / "first")) == len(stored(url)) == 3
    disk = (await second.shard.stats()).disk
    assert (disk.hits, disk.written, disk.blocks, disk.warnings) == (3, 3, 3, [])
    second = Node(url, tmp_path / "second")
    assert await second.tiers(*requests) == ["disk"] * 3
    assert (second.disk and second.disk.usage().hits, second.volume.usage().hits) == (3, 0), "the disk is asked first"
    assert second.volume.usage().written == 0


async def test_a_volume_alone(url: str) -> None:
    assert await Node(url).tiers(wanted(1)) == ["encoded"]
    node = Node(url)
    assert await node.tiers(wanted(1)) == ["volume"]
    stats = await node.shard.stats()
    assert (stats.misses, stats.disk.hits, stats.disk.budget_bytes) == (0, 1, 0)


async def test_a_purge_on_any_node_is_a_purge_of_the_volume(url: str, tmp_path: Path) -> None:
    first, second = Node(url, tmp_path / "first"), Node(url)
    await first.tiers(wanted(1), wanted(2, "other"))
    assert await second.shard.purge([DOCUMENT]) == 0
    assert [path.rpartition("/")[2] for path in stored(url)] == [wanted(2).key]
    assert await first.shard.purge([DocumentId("t", "c", "")]) == 2
    assert (files(tmp_path / "first"), stored(url)) == ([], {})


async def test_what_was_purged_while_it_was_encoded_is_not_written(url: str) -> None:
    node = Node(url)
    node.encoder.go.clear()
    waiting = asyncio.ensure_future(node.shard.acquire([wanted(1)]))
    await node.encoder.asked.wait()
    await node.shard.purge([DOCUMENT])
    node.encoder.go.set()
    await waiting
    await node.volume.settled()
    assert stored(url) == {}


async def test_a_volume_that_does_not_answer_fails_no_question_but_purges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tier, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr(volume_tier, "PURGE_TIMEOUT_S", 0.1)
    volume = HangingVolume()
    node = Node(volume)
    try:
        for number in range(10):
            [block] = await node.shard.acquire([wanted(number)])
            assert block.tier == "encoded"
        assert volume.calls == 2, "one read and one write, which hang"
        assert "the volume is slow" in (await node.shard.stats()).disk.warnings[0]
        with pytest.raises(UnavailableError, match="may still be on"):
            await node.shard.purge([DOCUMENT])
        await settle()
        assert len(node.shard.store) == 0, "none of it is handed out all the same"
    finally:
        volume.released.set()
    assert await node.shard.purge([DOCUMENT]) == 0


async def test_a_volume_that_cannot_be_opened_fails_no_question(tmp_path: Path) -> None:
    node = Node("s4://bucket/blocks", tmp_path)
    assert await node.tiers(wanted(1), wanted(2)) == ["encoded"] * 2
    stats = await node.shard.stats()
    assert stats.disk.blocks == 2
    assert all("Protocol not known: s4" in warning for warning in stats.disk.warnings)
    with pytest.raises(UnavailableError, match="Protocol not known: s4"):
        await node.shard.purge([DOCUMENT])
    assert files(tmp_path) == []
