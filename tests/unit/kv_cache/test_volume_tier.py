from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

from blockrag.errors import UnavailableError
from blockrag.keys import KeyMaker
from blockrag.kv_cache import file_tier, volume_tier
from blockrag.kv_cache.block_files import folder_of, packed
from blockrag.kv_cache.shard import document_of
from blockrag.kv_cache.shard_messages import DocumentId, EncodedObject
from blockrag.kv_cache.volume import Volume
from blockrag.kv_cache.volume_tier import VolumeTier
from blockrag.types import FULL, BlockForm, BlockRequest, CachedBlock
from blockrag.v1.kv_cache_pb2 import DiskUsage
from tests.unit.kv_cache.disk_parts import as_object, assert_same_block, block_of, read, wanted
from tests.unit.kv_cache.volume_parts import HangingVolume, open_volume_tier, store, stored

FORMS = (FULL, BlockForm("compressed", 2), BlockForm("chunks", 2))


def path_of(request: BlockRequest) -> str:
    return f"{folder_of(document_of(request))}/{request.key}"


def offer(tier: VolumeTier, request: BlockRequest, encode_s: float = 1.0) -> None:
    tier.offer(request, as_object(block_of(request)), document_of(request), encode_s, evict=True)


async def keep(tier: VolumeTier, request: BlockRequest, encode_s: float = 1.0) -> None:
    offer(tier, request, encode_s)
    await tier.settled()


async def found(tier: VolumeTier, request: BlockRequest) -> bool:
    loaded = await tier.load(request, document_of(request))
    if loaded is None:
        return False
    assert_same_block(loaded[0].ref, block_of(request))
    return True


@pytest.mark.parametrize("form", FORMS, ids=str)
async def test_another_system_reads_what_one_wrote_with_what_it_cost(url: str, form: BlockForm) -> None:
    request = wanted(1, form=form)
    await keep(open_volume_tier(url), request, 0.7)
    assert set(stored(url)) == {path_of(request)}
    tier = open_volume_tier(url)
    loaded = await tier.load(request, document_of(request))
    assert loaded is not None
    assert_same_block(loaded[0].ref, block_of(request))
    assert loaded[1] == 0.7
    assert not await found(tier, wanted(2))
    assert tier.usage() == DiskUsage(hits=1)


async def test_a_file_is_written_once_whoever_has_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = open_volume_tier(url), open_volume_tier(url)
    await keep(first, wanted(1))
    before = stored(url)
    await keep(first, wanted(1), 9.0)
    await keep(second, wanted(1), 9.0)
    assert stored(url) == before
    assert [tier.usage().written for tier in (first, second)] == [1, 0]
    assert await found(second, wanted(1))


async def test_damaged_and_foreign_files_are_misses_and_removed(url: str) -> None:
    tier = open_volume_tier(url)
    requests = [wanted(number) for number in range(5)]
    for request in requests:
        await keep(tier, request)
    content = stored(url)[path_of(requests[0])]
    store(url, path_of(requests[0]), content[:-1])
    store(url, path_of(requests[1]), content[:-1] + bytes([content[-1] ^ 1]))
    store(url, path_of(requests[2]), content)
    store(url, path_of(requests[3]), b"")
    assert [await found(tier, request) for request in requests] == [False] * 4 + [True]
    await tier.settled()
    assert set(stored(url)) == {path_of(requests[4])}
    assert (tier.usage().rejected, tier.usage().hits, tier.usage().warnings) == (4, 1, [])
    await keep(tier, requests[0])
    assert await found(tier, requests[0])


async def test_files_of_other_weights_or_another_secret_are_not_found_and_stay(url: str) -> None:
    await keep(open_volume_tier(url), wanted(1))
    tier = open_volume_tier(url)
    for keys in (KeyMaker("retrained", b"secret"), KeyMaker("fingerprint", b"another")):
        assert not await found(tier, wanted(1, keys=keys))
    await tier.settled()
    assert set(stored(url)) == {path_of(wanted(1))}
    # One that was given the name of such a block holds other tokens, or another tenant's.
    wrong = wanted(2, tenant="u")
    store(url, path_of(wanted(2)), b"".join(packed(block_of(wrong), "u", FULL, 1.0)))
    assert not await found(tier, wanted(2))
    await tier.settled()
    assert set(stored(url)) == {path_of(wanted(1))}


async def test_a_purge_removes_a_document_s_and_a_collection_s_files_whoever_wrote_them(url: str) -> None:
    one, other = open_volume_tier(url), open_volume_tier(url)
    await keep(one, wanted(1))
    await keep(other, wanted(2))
    await keep(one, wanted(1, "e"))
    await keep(one, wanted(1, collection="x"))
    await other.erase(DocumentId("t", "c", "d"))
    assert set(stored(url)) == {path_of(wanted(1, "e")), path_of(wanted(1, collection="x"))}
    await other.erase(DocumentId("t", "c", ""))
    assert set(stored(url)) == {path_of(wanted(1, collection="x"))}
    assert not await found(one, wanted(1))


async def test_a_purge_reaches_what_waits_to_be_written_and_what_is_being_written(url: str) -> None:
    for turns in range(20):
        tier = open_volume_tier(url)
        for number in (1, 2):
            offer(tier, wanted(number))
        for _ in range(turns):
            await asyncio.sleep(0.0001 if turns > 10 else 0)
        tier.forget(document_of(wanted(1)))
        await tier.erase(document_of(wanted(1)))
        assert stored(url) == {}
        await tier.settled()
        assert stored(url) == {}


async def test_what_belongs_to_no_document_is_not_kept_there(url: str) -> None:
    tier = open_volume_tier(url)
    given = wanted(1, "", collection="")
    await keep(tier, given)
    assert stored(url) == {}
    assert not await found(tier, given)


async def test_a_volume_slower_than_the_encoder_is_passed_over_and_tried_again(url: str) -> None:
    tier = open_volume_tier(url)
    await keep(tier, wanted(1), 1e-12)  # no reading can be quicker than that
    assert await found(tier, wanted(1)), "nothing was read yet"
    answers = [await found(tier, wanted(1)) for _ in range(32)]
    assert answers.count(True) == 2
    assert tier.usage().slower == 30


async def test_finding_nothing_counts_where_it_takes_longer_than_encoding(url: str) -> None:
    tier = open_volume_tier(url)
    await keep(tier, wanted(1), 1e-12)
    assert not await found(tier, wanted(2))
    assert not await found(tier, wanted(2))
    assert tier.usage().slower == 1


class Broken(Volume):
    """Every call of it fails."""

    def __init__(self) -> None:
        super().__init__("memory://broken")
        self.calls = 0

    @property
    def _place(self) -> NoReturn:
        self.calls += 1
        raise RuntimeError("no credentials")


async def test_a_volume_that_fails_is_a_warning_and_left_for_a_while() -> None:
    volume = Broken()
    tier = open_volume_tier(volume)
    for number in range(3):
        assert not await found(tier, wanted(number))
        await keep(tier, wanted(number))
    usage = tier.usage()
    assert (usage.hits, usage.written, usage.dropped, usage.pending) == (0, 0, 3, 0)
    assert usage.warnings == [
        "blocks on the volume cannot be read: RuntimeError: no credentials",
        "blocks cannot be written to the volume: RuntimeError: no credentials",
    ]
    assert volume.calls == 3, "at the start, for one read and for one write"
    with pytest.raises(UnavailableError, match=r"may still be on kv_cache\.volume, try again: RuntimeError: no cred"):
        await tier.erase(document_of(wanted(1)))


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingVolume]:
    monkeypatch.setattr(file_tier, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr(volume_tier, "PURGE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(volume_tier, "_SLOW_WRITE_S", 0.05)
    volume = HangingVolume()
    yield volume
    volume.released.set()


async def test_a_volume_that_hangs_costs_a_bounded_time(
    hanging: HangingVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_tier, "RETRY_S", 0.0)
    tier = open_volume_tier(hanging)
    started = time.monotonic()
    assert not any(await asyncio.gather(*(found(tier, wanted(number)) for number in range(20))))
    assert time.monotonic() - started < 5
    asked = hanging.calls
    assert not any([await found(tier, wanted(number)) for number in range(20)])
    assert hanging.calls == asked, "what hangs is not asked again"
    assert tier.usage().warnings == ["the volume is slow: a block took longer than 0.1 s to read"]
    hanging.released.set()
    while tier.usage() != DiskUsage(slower=tier.usage().slower):
        await asyncio.sleep(0.01)
        await found(tier, wanted(1))


async def test_a_question_that_is_given_up_leaves_a_read_that_hangs(hanging: HangingVolume) -> None:
    tier = open_volume_tier(hanging)
    reading = asyncio.ensure_future(found(tier, wanted(1)))
    await asyncio.sleep(0.02)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not await found(tier, wanted(2))
    assert hanging.calls == 1


async def test_a_write_that_hangs_is_a_warning_and_purges_say_so(hanging: HangingVolume) -> None:
    tier = open_volume_tier(hanging)
    offer(tier, wanted(1))
    offer(tier, wanted(2, "e"))
    await asyncio.sleep(0.1)
    assert (tier.usage().pending, tier.usage().written) == (2, 0)
    assert "taken longer than 0.05 s to write" in tier.usage().warnings[0]
    assert tier.forget(document_of(wanted(1))) == {wanted(1).key}
    with pytest.raises(UnavailableError, match=r"no answer within 0\.1 s"):
        await tier.erase(document_of(wanted(1)))
    hanging.released.set()
    await tier.erase(document_of(wanted(1)))
    await tier.settled()
    usage = tier.usage()
    assert (usage.pending, usage.written, usage.warnings) == (0, 1, [])


async def test_a_block_for_which_there_is_no_room_in_memory_is_encoded(url: str) -> None:
    request = wanted(1)
    await keep(open_volume_tier(url), request)

    def full(_: CachedBlock) -> EncodedObject:
        raise RuntimeError("the object store is full")  # as Ray says it, with an error of its own

    tier = VolumeTier(Volume(url), put=full, read=read)
    assert await tier.load(request, document_of(request)) is None
    assert stored(url)
