from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import pytest

from blockrag.errors import DeadlineError
from blockrag.kv_cache.fetching import BlockFetcher, follow_purges
from blockrag.kv_cache.shard_messages import PurgeLog


class Source:
    """Tells of each log once, then of nothing."""

    def __init__(self, *logs: PurgeLog | Exception) -> None:
        self._logs = list(logs)

    async def poll_purges(self) -> PurgeLog:
        log = self._logs.pop(0) if self._logs else PurgeLog(9, [], reset=False)
        if isinstance(log, Exception):
            raise log
        return log


class Copies:
    def __init__(self) -> None:
        self.told: list[list[str] | str] = []

    def purge(self, keys: Iterable[str]) -> None:
        self.told.append(list(keys))

    def clear(self) -> None:
        self.told.append("clear")


async def test_copies_forget_what_was_purged(caplog: pytest.LogCaptureFixture) -> None:
    logs = [PurgeLog(0, [], reset=True), RuntimeError("lost"), PurgeLog(2, ["a", "b"], reset=False)]
    copies, enough, kept_up = Copies(), asyncio.Event(), []

    def keep_up() -> None:
        kept_up.append(len(copies.told))
        if len(kept_up) == 5:
            enough.set()
        if len(kept_up) == 2:
            raise RuntimeError("upkeep")

    with caplog.at_level(logging.ERROR):
        following = asyncio.ensure_future(follow_purges(Source(*logs), copies, keep_up, period_s=0.001))
        await asyncio.wait_for(enough.wait(), 5)
        assert not following.done()
    following.cancel()
    assert copies.told == ["clear", ["a", "b"]]
    assert kept_up == [1, 1, 2, 2, 2]
    assert [record.exc_info[1].args[0] for record in caplog.records if record.exc_info] == ["lost", "upkeep"]  # type: ignore[union-attr]


class Shard:
    def __init__(self, *answers: PurgeLog | Exception) -> None:
        self._answers = list(answers)

    async def purged_since(self, cursor: int) -> PurgeLog:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Group:
    patience_s = 1.0

    def __init__(self, *shards: Shard) -> None:
        self.shards = list(shards)


async def test_a_shard_that_fails_takes_nothing_of_the_others() -> None:
    told, quiet = PurgeLog(7, ["purged"], reset=False), PurgeLog(7, [], reset=False)
    failing = Shard(DeadlineError("late"), PurgeLog(3, ["later"], reset=False))
    source = BlockFetcher(Group(Shard(told, quiet), failing), None)  # type: ignore[arg-type]
    assert (await source.poll_purges()).keys == ["purged"]
    assert (await source.poll_purges()).keys == ["later"]
