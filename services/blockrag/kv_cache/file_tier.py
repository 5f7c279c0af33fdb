"""What a shard's disk and the volume do alike: files are read in threads and in bounded time, and written behind.

Load or encode: what reading takes is measured for each form, and a block encoded where that was quicker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from blockrag.errors import DataError
from blockrag.kv_cache.pace import LoadOrEncode
from blockrag.kv_cache.shard_messages import EncodedObject
from blockrag.kv_cache.write_behind import RETRY_S, Pending, ReadObject, Warnings, WriteBehind
from blockrag.types import BlockForm, BlockRequest, CachedBlock
from blockrag.v1.kv_cache_pb2 import DiskUsage

READ_TIMEOUT_S = 5.0
"""A read that takes longer is left, and the block encoded; nothing is read for ``RETRY_S`` then, nor before the read
has ended."""

_logger = logging.getLogger(__name__)

Loaded = tuple[EncodedObject, float]
"""An object made of a block's file, and the seconds that encoding it took."""
_Looked = tuple[Loaded | None, float]
"""None: no file. And the seconds that it took."""


class FileTier:
    """Files of one shard's blocks; all calls on one event loop."""

    def __init__(
        self,
        name: Literal["disk", "volume"],
        readers: int,
        write: Callable[[Pending, CachedBlock], Awaitable[bool]],
        *,
        put: Callable[[CachedBlock], EncodedObject],
        read: ReadObject,
        connect: Callable[[], object] = lambda: None,
    ) -> None:
        """``write`` as of ``WriteBehind``. ``put`` makes an object of a block; in a thread, as ``connect`` before each
        read, which is not measured."""
        self.name = name
        self._where = f"the {name}"
        self._put = put
        self._connect = connect
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-writer")
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix=f"{name}-reader")
        self._left: set[Future[_Looked]] = set()
        """Reads that nobody waits for any more."""
        self._paused_until = 0.0
        self._choices: defaultdict[BlockForm, LoadOrEncode] = defaultdict(LoadOrEncode)
        self._hits = self._rejected = 0
        self._warnings = Warnings()
        self._queue = WriteBehind(self._where, write, read=read, warnings=self._warnings)

    async def settled(self) -> None:
        """Returns when nothing waits to be written or removed."""
        await self._queue.settled()
        await self._in_writer(lambda: None)

    def usage(self) -> DiskUsage:
        """What happened there since the start."""
        return DiskUsage(
            hits=self._hits,
            slower=sum(choice.slower for choice in self._choices.values()),
            written=self._queue.written,
            rejected=self._rejected,
            dropped=self._queue.dropped,
            pending=len(self._queue),
            warnings=self._warnings.texts(),
        )

    async def _read(
        self, request: BlockRequest, read: Callable[[], tuple[CachedBlock, float]], units: int, encode_s: float
    ) -> Loaded | None:
        """What ``read`` reads, in a thread. None: encoding the block is quicker, or it does not come in time.

        ``units`` say how large it is; ``encode_s`` is what encoding it takes, 0: not known. Raises ``DataError`` for a
        file of no use, ``OSError`` for one that is not there or cannot be read.
        """
        choice = self._choices[request.form]
        if self._left or time.monotonic() < self._paused_until or (encode_s and not choice.load(units, encode_s)):
            return None
        reading = await self._ended(self._readers.submit(self._timed, read))
        if reading is None:
            choice.reading.measured(READ_TIMEOUT_S, units)
            self._pause()
            self._warnings.warn(
                "reading", f"{self._where} is slow: a block took longer than {READ_TIMEOUT_S:g} s to read"
            )
            return None
        try:
            found, seconds = reading.result()
        except DataError as error:
            _logger.info("the file of block %s on %s is of no use: %s", request.key, self._where, error)
            self._rejected += 1
            raise
        except OSError as error:
            self._warnings.warn("reading", f"blocks on {self._where} cannot be read: {error}")
            raise
        except Exception:
            _logger.exception("block %s could not be kept in memory as it was read; it is encoded", request.key)
            return None
        self._warnings.over("reading")
        # where finding nothing takes longer than reading did, reading takes as long at least
        if found is not None or seconds > choice.reading.expected(units):
            choice.reading.measured(seconds, units)
        if found is None:
            raise FileNotFoundError
        self._hits += 1
        return found

    def _timed(self, read: Callable[[], tuple[CachedBlock, float]]) -> _Looked:
        self._connect()
        started = time.perf_counter()
        try:
            block, encode_s = read()
        except FileNotFoundError:
            return None, time.perf_counter() - started
        return (self._put(block), encode_s), time.perf_counter() - started

    async def _ended(self, reading: Future[_Looked]) -> asyncio.Future[_Looked] | None:
        """The reading once it has ended; None: it has not in time."""
        waiting = asyncio.wrap_future(reading)
        try:
            await asyncio.wait([waiting], timeout=READ_TIMEOUT_S)
            return waiting if waiting.done() else None
        finally:  # by cancellation too: a question may have less time
            if not waiting.done():
                waiting.cancel()
                self._left.add(reading)
                reading.add_done_callback(self._left.discard)

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + RETRY_S

    def _later(self, call: Callable[..., object], *arguments: Any) -> None:
        """Calls what may fail because the file is gone; what else is wrong, reading and writing will say."""
        self._writer.submit(_quietly, call, *arguments)

    async def _in_writer(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._writer, call, *arguments)


def _quietly(call: Callable[..., object], *arguments: Any) -> None:
    try:
        call(*arguments)
    except OSError as error:
        _logger.info("%s: %s", call.__name__, error)
