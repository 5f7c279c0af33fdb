"""Collects items into batches of a bounded size and computes them in a thread, one batch at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from blockrag.aio import detached

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    size: int
    arrival: float
    future: asyncio.Future[Result]


@dataclass
class BatchStats:
    """Since the start; batches that failed count too, and once."""

    items: int = 0
    size: int = 0
    """Sum of the items' sizes."""
    batches: int = 0


class Batcher(Generic[Item, Result]):
    """First come, first served, as many at a time as fit ``max_size``; an item larger than that is computed alone.

    ``compute`` gets the items of a batch and returns their results in order; it runs in the batcher's one thread, so
    it need not be thread-safe and the event loop stays free. Where it fails on a batch, each of the items is computed
    alone, so that an error goes to what it is about. A batch that is not full waits ``wait_s`` seconds from its first
    item's arrival, never while a batch is computed.

    All calls come from one event loop. What bounds the number of waiting items is the caller.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_size: int,
        wait_s: float,
        executor: ThreadPoolExecutor | None = None,
    ) -> None:
        if max_size < 1 or wait_s < 0:
            raise ValueError("max_size must be at least 1 and wait_s not negative")
        self.stats = BatchStats()
        self._compute = compute
        self._max_size = max_size
        self._wait_s = wait_s
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._queued_size = 0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, item: Item, size: int) -> Result:
        """The item's result. A caller that is cancelled before its batch starts costs no computation."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting[Item, Result](item, size, loop.time(), loop.create_future())
        self._queue.append(waiting)
        self._queued_size += size
        self._arrived.set()
        if self._worker is None or self._worker.done():
            self._worker = detached(self._work())
        return await waiting.future

    async def _work(self) -> None:
        """Runs while there is something to compute."""
        while self._queue:
            await self._fill(self._queue[0].arrival + self._wait_s)
            batch = self._take()
            if not batch:
                continue
            self.stats.batches += 1
            self.stats.items += len(batch)
            self.stats.size += sum(waiting.size for waiting in batch)
            await self._settle(batch)

    async def _settle(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        """Computes a batch and tells who waits; where that fails, each of its items alone."""
        items = [waiting.item for waiting in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, items)
        except Exception as error:
            if len(batch) > 1:
                _logger.warning("a batch of %d failed, computing each alone: %s", len(batch), error)
                for waiting in batch:
                    if not waiting.future.done():
                        await self._settle([waiting])
            elif not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        wrong = RuntimeError(f"{len(results)} results for {len(batch)} items") if len(results) != len(batch) else None
        for place, waiting in enumerate(batch):
            if waiting.future.done():
                continue
            if wrong is None:
                waiting.future.set_result(results[place])
            else:
                waiting.future.set_exception(wrong)

    async def _fill(self, until: float) -> None:
        """Waits until a batch is full or its time has come."""
        loop = asyncio.get_running_loop()
        while self._queued_size < self._max_size and (left := until - loop.time()) > 0:
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The next batch, without items whose callers have left."""
        batch: list[_Waiting[Item, Result]] = []
        size = 0
        while self._queue:
            waiting = self._queue[0]
            if not waiting.future.done():
                if batch and size + waiting.size > self._max_size:
                    break
                batch.append(waiting)
                size += waiting.size
            self._queue.popleft()
            self._queued_size -= waiting.size
        return batch
