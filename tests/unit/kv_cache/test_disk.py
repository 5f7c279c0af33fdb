from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import UnavailableError
from blockrag.keys import KeyMaker
from blockrag.kv_cache import disk, file_tier
from blockrag.kv_cache.block_files import UNFINISHED, folder_of, read_block
from blockrag.kv_cache.disk import DiskTier
from blockrag.kv_cache.disk_index import CANDIDATES
from blockrag.kv_cache.shard import document_of
from blockrag.kv_cache.shard_messages import DocumentId, EncodedObject
from blockrag.kv_cache.shards import owner, shard_names
from blockrag.kv_cache.write_behind import MOST_PENDING_BYTES
from blockrag.types import BlockRequest, CachedBlock
from tests.unit.kv_cache.disk_parts import (
    FILE_BYTES,
    KEYS,
    as_object,
    block_of,
    files,
    found,
    keep,
    open_tier,
    wanted,
)


async def test_a_block_survives_its_process_with_what_it_cost(tmp_path: Path) -> None:
    await keep(open_tier(tmp_path), wanted(1), 0.7)
    tier = open_tier(tmp_path)
    loaded = await tier.load(wanted(1), document_of(wanted(1)))
    assert loaded is not None
    assert loaded[1] == 0.7
    assert not await found(tier, wanted(2))
    usage = tier.usage()
    assert (usage.blocks, usage.bytes, usage.hits, usage.written, usage.warnings) == (1, FILE_BYTES, 1, 0, [])


async def test_writing_takes_nothing_of_the_caller_s_time_and_is_bounded(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 100_000)
    large = EncodedObject(block_of(wanted(0)), MOST_PENDING_BYTES // 4)
    for number in range(5):
        tier.offer(wanted(number), large, document_of(wanted(number)), 1.0, evict=True)
    usage = tier.usage()
    assert (usage.pending, usage.dropped, files(tmp_path)) == (3, 2, [])
    assert "slower" in usage.warnings[0]
    await tier.settled()
    usage = tier.usage()
    assert (usage.pending, usage.written, usage.warnings) == (0, 3, [])


async def test_a_block_is_written_once(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    for _ in range(3):
        tier.offer(wanted(1), as_object(block_of(wanted(1))), document_of(wanted(1)), 1.0, evict=True)
    await tier.settled()
    await keep(tier, wanted(1))
    assert tier.usage().written == 1


async def test_of_the_blocks_unused_for_longest_the_cheapest_makes_room(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, CANDIDATES + 2)
    for number in range(CANDIDATES + 2):
        await keep(tier, wanted(number), 0.01 if number == CANDIDATES + 1 else 2.0 + number)
    assert await found(tier, wanted(0))  # now used last: the candidates are 1 to CANDIDATES
    await keep(tier, wanted(100))
    assert [number for number in range(CANDIDATES + 2) if wanted(number).key not in tier.index] == [1]
    assert (tier.usage().evictions, len(files(tmp_path))) == (1, CANDIDATES + 2)


async def test_what_is_held_in_memory_is_written_again_where_there_is_room(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 2)
    await keep(tier, wanted(1), evict=False)
    await keep(tier, wanted(2), evict=False)
    await keep(tier, wanted(3), evict=False)
    assert [await found(tier, wanted(number)) for number in (1, 2, 3)] == [True, True, False]


async def test_a_tenant_over_its_share_makes_room_among_its_own(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 4, tenant_share=0.5)
    await keep(tier, wanted(0, tenant="other"), 0.001)
    for number in range(1, 4):
        await keep(tier, wanted(number))
    assert await found(tier, wanted(0, tenant="other"))
    assert [await found(tier, wanted(number)) for number in (1, 2, 3)] == [False, True, True]


async def test_blocks_expire_on_disk_too_also_while_nothing_runs(tmp_path: Path) -> None:
    now = 1000.0
    tier = open_tier(tmp_path, ttl_s=100, clock=lambda: now)
    await keep(tier, wanted(1))
    await keep(tier, wanted(2))
    now += 90
    assert await found(tier, wanted(2))
    await tier.settled()
    now += 50
    tier = open_tier(tmp_path, ttl_s=100, clock=lambda: now)
    assert [await found(tier, wanted(number)) for number in (1, 2)] == [False, True]
    await tier.settled()
    assert len(files(tmp_path)) == 1


async def test_a_purge_reaches_what_waits_to_be_written_and_what_is_being_written(tmp_path: Path) -> None:
    for turns in range(40):  # a purge at any moment of two blocks' writing
        tier = open_tier(tmp_path)
        for number in (1, 2):
            tier.offer(
                wanted(number), as_object(block_of(wanted(number))), document_of(wanted(number)), 1.0, evict=True
            )
        for _ in range(turns):
            await asyncio.sleep(0.0001 if turns > 20 else 0)
        tier.forget(document_of(wanted(1)))
        assert not await found(tier, wanted(1))
        await tier.erase(document_of(wanted(1)))
        assert files(tmp_path) == []
        await tier.settled()
        assert files(tmp_path) == []
        assert (len(tier.index), tier.index.nbytes) == (0, 0)


async def test_a_block_of_no_document_is_purged_with_the_first_that_asks_for_it(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    given, owned = wanted(1, "", collection=""), wanted(1)
    assert given.key == owned.key
    await keep(tier, given)
    tier.forget(document_of(owned))
    assert await found(tier, given)
    assert await found(tier, owned)
    await tier.settled()
    tier = open_tier(tmp_path)
    assert tier.forget(DocumentId("t", "c", "")) == {owned.key}
    await tier.erase(DocumentId("t", "c", ""))
    assert files(tmp_path) == []
    assert not await found(open_tier(tmp_path), given)


async def test_a_block_may_get_a_document_at_any_moment_of_its_writing(tmp_path: Path) -> None:
    given, owned = wanted(1, "", collection=""), wanted(1)
    for turns in range(60):
        tier = open_tier(tmp_path)
        tier.offer(given, as_object(block_of(given)), document_of(given), 1.0, evict=True)
        for _ in range(turns):
            await asyncio.sleep(0.0001 if turns > 20 else 0)
        assert tier.use(owned.key, document_of(owned))
        if turns % 2:
            await tier.settled()
            assert [path.parent.relative_to(tmp_path).as_posix() for path in files(tmp_path)] == [
                folder_of(document_of(owned))
            ]
        assert tier.forget(document_of(owned)) == {owned.key}
        await tier.erase(document_of(owned))
        await tier.settled()
        assert files(tmp_path) == []


async def test_damaged_unfinished_and_foreign_files_are_misses_and_removed(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    for number in range(4):
        await keep(tier, wanted(number))
    at = [tmp_path / folder_of(document_of(wanted(number))) / wanted(number).key for number in range(4)]
    at[0].write_bytes(at[0].read_bytes()[:-1])
    at[1].write_bytes(at[1].read_bytes()[:-1] + b"\0")
    at[2].unlink()
    assert [await found(tier, wanted(number)) for number in range(4)] == [False, False, False, True]
    await tier.settled()
    assert (files(tmp_path), tier.usage().rejected, len(tier.index)) == ([at[3]], 2, 1)
    at[3].with_name(wanted(9).key + UNFINISHED).write_bytes(b"x")
    at[3].with_name(wanted(8).key).write_bytes(b"")
    tier = open_tier(tmp_path)
    assert (files(tmp_path), tier.usage().rejected) == ([at[3]], 2)
    tier = open_tier(tmp_path, keys=KeyMaker("retrained", b"secret"))
    assert (files(tmp_path), tier.usage().rejected, len(tier.index)) == ([], 1, 0)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
async def test_another_number_of_shards_finds_every_block_once(before: int, after: int, tmp_path: Path) -> None:
    def tiers(number: int) -> list[DiskTier]:
        names = shard_names(number)
        return [
            open_tier(tmp_path, owns=lambda key, index=index: owner(key, names) == index, shards=number)
            for index in range(number)
        ]

    shards = tiers(before)
    for number in range(30):
        await keep(shards[owner(wanted(number).key, shard_names(before))], wanted(number))
    shards = tiers(after)
    assert sum(len(shard.index) for shard in shards) == 30
    for number in range(30):
        held = [await found(shard, wanted(number)) for shard in shards]
        assert [index for index, there in enumerate(held) if there] == [owner(wanted(number).key, shard_names(after))]
    # Any one of them removes a purged document's files of all, and the others see it.
    await shards[-1].erase(document_of(wanted(0)))
    assert files(tmp_path) == []
    for shard in shards:
        assert not any([await found(shard, wanted(number)) for number in range(30)])
        assert (len(shard.index), shard.usage().rejected) == (0, 0)


async def test_a_disk_slower_than_the_encoder_is_passed_over_and_tried_again(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    await keep(tier, wanted(1), 1e-12)  # no reading can be quicker than that
    await keep(tier, wanted(2), 60.0)
    assert await found(tier, wanted(2))
    answers = [await found(tier, wanted(1)) for _ in range(32)]
    assert answers.count(True) == 2
    assert tier.usage().slower == 30
    assert await found(tier, wanted(2)), "the rule is each block's own"


async def test_a_disk_that_hangs_costs_the_questions_of_one_moment_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_tier, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr(file_tier, "RETRY_S", 0.0)
    released, asked = threading.Event(), []

    def hang(path: Path, request: BlockRequest) -> CachedBlock:
        asked.append(request.key)
        assert released.wait(30)
        return read_block(path, request)

    tier = open_tier(tmp_path)
    for number in range(8):
        await keep(tier, wanted(number), 60.0)
    monkeypatch.setattr(disk, "read_block", hang)
    assert not any(await asyncio.gather(*(found(tier, wanted(number)) for number in range(8))))
    assert not any([await found(tier, wanted(number)) for number in range(8)])
    assert len(asked) == 2, "what hangs is not asked again"
    assert tier.usage().warnings == ["the disk is slow: a block took longer than 0.1 s to read"]
    released.set()
    while not await found(tier, wanted(0)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (tier.usage().warnings, len(tier.index)) == ([], 8)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond a hundred bytes: the write that fails on a full disk fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_a_warning_and_writing_is_left_for_a_while(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    await keep(tier, wanted(1))
    with full_disk():
        await keep(tier, wanted(2))
        assert await found(tier, wanted(1))
    await keep(tier, wanted(3))
    usage = tier.usage()
    assert (usage.blocks, usage.dropped, usage.pending, len(files(tmp_path))) == (1, 2, 0, 1)
    assert "cannot be written" in usage.warnings[0]


async def test_a_folder_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    tier = open_tier(tmp_path / "file" / "blocks")
    await keep(tier, wanted(1))
    assert not await found(tier, wanted(1))
    tier.forget(document_of(wanted(1)))
    await tier.erase(document_of(wanted(1)))
    usage = tier.usage()
    assert (usage.budget_bytes, usage.blocks) == (0, 0)
    assert "not kept on disk" in usage.warnings[0]


async def test_a_purge_that_cannot_remove_says_so(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    folder = tmp_path / folder_of(document_of(wanted(1)))
    folder.parent.mkdir(parents=True)
    folder.write_text("no folder, which nothing here removes")
    with pytest.raises(UnavailableError, match="still in"):
        await tier.erase(document_of(wanted(1)))


async def test_a_budget_beyond_the_disk_is_cut_with_a_warning(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 2**60)
    usage = tier.usage()
    status = os.statvfs(tmp_path)
    assert 0 < usage.budget_bytes <= status.f_bavail * status.f_frsize
    assert "kv_cache.disk_mb" in usage.warnings[0]
    assert open_tier(tmp_path, 10).usage().warnings == []


async def test_a_block_larger_than_what_its_tenant_may_have_is_counted_as_not_written(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 10, tenant_share=0.05)
    await keep(tier, wanted(1))
    usage = tier.usage()
    assert (usage.written, usage.dropped, usage.blocks, files(tmp_path)) == (0, 1, 0, [])


async def test_a_smaller_budget_removes_what_was_used_longest_ago(tmp_path: Path) -> None:
    now = 1000.0
    tier = open_tier(tmp_path, clock=lambda: now)
    for number in range(4):
        now += 1
        await keep(tier, wanted(number))
    tier = open_tier(tmp_path, 2)
    await tier.settled()
    assert [await found(tier, wanted(number)) for number in range(4)] == [False, False, True, True]
    assert len(files(tmp_path)) == 2


async def test_a_lost_object_is_not_written(tmp_path: Path) -> None:
    async def lost(_: Any) -> CachedBlock | None:
        return None

    tier = DiskTier(tmp_path, 10 * FILE_BYTES, KEYS, put=as_object, read=lost)
    await keep(tier, wanted(1))
    assert files(tmp_path) == []
    assert tier.usage().pending == 0
