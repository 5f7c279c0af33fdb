from __future__ import annotations

import asyncio
from typing import Any

import pytest

from blockrag.kv_cache import write_behind
from blockrag.kv_cache.shard_messages import EncodedObject
from blockrag.kv_cache.write_behind import MOST_PENDING_BYTES, Pending, Warnings, WriteBehind
from blockrag.types import CachedBlock
from tests.unit.kv_cache.disk_parts import as_object, block_of, read, wanted


class Files:
    """Where blocks are written to, once they may."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.error: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.warnings = Warnings()
        self.queue = WriteBehind("the shelf", self.write, read=read, warnings=self.warnings)

    async def write(self, pending: Pending, block: CachedBlock) -> bool:
        assert self.queue.mutating.locked()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.written.append(f"{pending.folder}/{block.key}")
        return not pending.purged

    def offer(self, number: int, folder: str = "t/c/d", nbytes: int = 100) -> None:
        request = wanted(number)
        self.queue.offer(request, EncodedObject(block_of(request), 0), nbytes, folder, 1.0)


async def test_blocks_are_written_in_order_and_once() -> None:
    files = Files()
    for number in (1, 2, 1):
        files.offer(number)
    assert (len(files.queue), files.queue.nbytes, files.written) == (2, 200, [])
    await files.queue.settled()
    assert files.written == [f"t/c/d/{wanted(number).key}" for number in (1, 2)]
    assert (len(files.queue), files.queue.nbytes, files.queue.written) == (0, 0, 2)


async def test_what_is_more_than_waits_is_dropped_with_a_warning_that_ends() -> None:
    files = Files()
    for number in range(5):
        files.offer(number, nbytes=MOST_PENDING_BYTES // 4)
    assert (len(files.queue), files.queue.dropped) == (4, 1)
    assert files.warnings.texts() == ("the shelf is slower than the encoder: blocks were not written",)
    await files.queue.settled()
    assert (files.queue.written, files.warnings.texts()) == (4, ())


@pytest.mark.parametrize(("folder", "kept"), [("t/c/d", ["t/c/dd", "t/x/d"]), ("t/c", ["t/x/d"])])
async def test_what_was_purged_is_not_written(folder: str, kept: list[str]) -> None:
    files = Files()
    for number, place in enumerate(("t/c/d", "t/c/dd", "t/x/d")):
        files.offer(number, place)
    assert len(files.queue.forget(folder)) == 3 - len(kept)
    await files.queue.settled()
    assert [path.rpartition("/")[0] for path in files.written] == kept


async def test_after_a_failure_none_is_written_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files()
    files.error = OSError("full")
    files.offer(1)
    files.offer(2)
    await files.queue.settled()
    files.offer(3)
    assert (files.queue.written, files.queue.dropped, len(files.queue)) == (0, 3, 0)
    assert files.warnings.texts() == ("blocks cannot be written to the shelf: full",)
    monkeypatch.setattr(write_behind, "RETRY_S", 0.0)
    files, files.error = Files(), OSError("full")
    files.offer(1)
    await files.queue.settled()
    files.error = None
    files.offer(2)
    await files.queue.settled()
    assert (files.queue.written, files.warnings.texts()) == (1, ())


async def test_an_error_of_any_kind_ends_no_writing(caplog: pytest.LogCaptureFixture) -> None:
    files = Files()
    files.error = RuntimeError("bug")
    files.offer(1)
    await files.queue.settled()
    files.error = None
    files.offer(2)
    await files.queue.settled()
    assert (files.queue.written, files.queue.dropped) == (1, 1)
    assert "bug" in caplog.text


async def test_a_lost_object_is_not_written() -> None:
    async def lost(_: Any) -> CachedBlock | None:
        return None

    files = Files()
    queue = WriteBehind("the shelf", files.write, read=lost, warnings=files.warnings)
    queue.offer(wanted(1), as_object(block_of(wanted(1))), 100, "t/c/d", 1.0)
    await queue.settled()
    assert (files.written, queue.written, queue.dropped) == ([], 0, 0)
