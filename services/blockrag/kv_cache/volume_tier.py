"""A volume behind the local disks: what any system with the same bundle and secret encoded, the others read.

Nothing is known of what is there: a block is looked for under the document that it is asked for, its file's name is its
key, and a file is checked as those on disk are. Blocks of no document are not kept there, since no purge would reach
them. Nothing is evicted.

Load or encode: reading, and encoding here, are measured by tokens, for each form: a file's size is known only once it
was read, and what it cost was another's machine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from blockrag.errors import DataError, UnavailableError
from blockrag.kv_cache.block_files import folder_of, most_header_bytes, packed, purged_folder, unpacked
from blockrag.kv_cache.pace import LoadOrEncode, Pace
from blockrag.kv_cache.shard_messages import DiskUsage, DocumentId, EncodedObject
from blockrag.kv_cache.volume import Volume
from blockrag.kv_cache.write_behind import RETRY_S, Pending, ReadObject, Warnings, WriteBehind
from blockrag.types import BlockForm, BlockRequest, CachedBlock

READ_TIMEOUT_S = 5.0
"""A read that takes longer is left, and the block encoded; the volume is not asked again for ``RETRY_S``, nor before
the read has ended."""
PURGE_TIMEOUT_S = 20.0
_SLOW_WRITE_S = 30.0
"""A write that takes longer is a warning."""
_READERS = 8
"""A volume's answers take longer than a disk's, but many can be on their way."""

_logger = logging.getLogger(__name__)


class _Looked(NamedTuple):
    found: tuple[EncodedObject, float] | None
    seconds: float


class VolumeTier:
    """One shard's way to the volume; all calls on one event loop."""

    def __init__(self, volume: Volume, *, put: Callable[[CachedBlock], EncodedObject], read: ReadObject) -> None:
        """Waits for nothing and raises nothing. ``put`` makes an object of a block, in a thread."""
        self._volume = volume
        self._put = put
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="volume-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="volume-reader")
        self._left: set[Future[_Looked]] = set()
        """Reads that nobody waits for any more."""
        self._paused_until = 0.0
        self._choices: defaultdict[BlockForm, LoadOrEncode] = defaultdict(LoadOrEncode)
        self._encoding: defaultdict[BlockForm, Pace] = defaultdict(Pace)
        self._counts = dict.fromkeys(("hits", "rejected"), 0)
        self._warnings = Warnings()
        self._queue = WriteBehind("the volume", self._write, read=read, warnings=self._warnings)
        # so that the first question does not wait for a package or a connection
        self._readers.submit(self._volume.open)

    async def load(self, request: BlockRequest, document: DocumentId) -> tuple[EncodedObject, float] | None:
        """An object made of the block's file, and the seconds that encoding it took.

        None where there is no file, encoding the block anew is quicker, or the volume does not answer in time. A file
        that is damaged, or not the block that was asked for, is removed.
        """
        if not document.named or self._left or time.monotonic() < self._paused_until:
            return None
        tokens, choice = request.token_ids.size, self._choices[request.form]
        encode_s = self._encoding[request.form].expected(tokens)
        if encode_s and not choice.load(tokens, encode_s):
            return None
        path = _path(folder_of(document), request.key)
        reading = await self._ended(self._readers.submit(self._look, path, request))
        if reading is None:
            choice.reading.measured(READ_TIMEOUT_S, tokens)
            self._pause(f"the volume is slow: a block took longer than {READ_TIMEOUT_S:g} s to read")
            return None
        try:
            looked = reading.result()
        except DataError as error:
            _logger.info("the file of block %s on the volume is of no use: %s", request.key, error)
            self._counts["rejected"] += 1
            self._writer.submit(self._remove, path)
            return None
        except OSError as error:
            self._pause(f"blocks on the volume cannot be read: {error}")
            return None
        except Exception:
            _logger.exception("block %s could not be kept in memory as it was read; it is encoded", request.key)
            return None
        self._warnings.over("reading")
        if looked.found is None:
            # where finding nothing takes longer than reading did, reading takes as long at least
            if looked.seconds > choice.reading.expected(tokens):
                choice.reading.measured(looked.seconds, tokens)
            return None
        choice.reading.measured(looked.seconds, tokens)
        self._counts["hits"] += 1
        return looked.found

    def offer(
        self, request: BlockRequest, encoded: EncodedObject, document: DocumentId, encode_s: float, *, evict: bool
    ) -> None:
        """Has a block written behind, where it has a document. Nothing is ever evicted."""
        tokens = request.token_ids.size
        self._encoding[request.form].measured(encode_s, tokens)
        if document.named:
            nbytes = encoded.nbytes + most_header_bytes(tokens)
            self._queue.offer(request, encoded, nbytes, folder_of(document), encode_s)

    def forget(self, document: DocumentId) -> set[str]:
        """From now on none of a document's blocks is written, nor a collection's; the keys of those that waited."""
        return self._queue.forget(purged_folder(document))

    async def erase(self, document: DocumentId) -> None:
        """Removes a document's files, or a collection's, whoever wrote them.

        Raises ``UnavailableError`` if the volume does not say in time that none is left.
        """
        try:
            async with asyncio.timeout(PURGE_TIMEOUT_S), self._queue.mutating:
                await self._in_writer(self._volume.remove_folder, purged_folder(document))
        except OSError as error:  # a TimeoutError too
            reason = str(error) or f"no answer within {PURGE_TIMEOUT_S:g} s"
            raise UnavailableError(
                f"blocks of a purged document may still be on kv_cache.volume, try again: {reason}"
            ) from error

    async def settled(self) -> None:
        """Returns when nothing waits to be written or removed."""
        await self._queue.settled()
        await self._in_writer(_nothing)

    def usage(self) -> DiskUsage:
        """What happened there since the start; what is there nobody counts."""
        return DiskUsage(
            slower=sum(choice.slower for choice in self._choices.values()),
            written=self._queue.written,
            dropped=self._queue.dropped,
            pending=len(self._queue),
            warnings=self._warnings.texts(),
            **self._counts,
        )

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

    def _pause(self, warning: str) -> None:
        self._paused_until = time.monotonic() + RETRY_S
        self._warnings.warn("reading", warning)

    def _look(self, path: str, request: BlockRequest) -> _Looked:
        self._volume.open()
        started = time.perf_counter()
        try:
            block, encode_s = unpacked(self._volume.read(path), request)
        except FileNotFoundError:
            return _Looked(None, time.perf_counter() - started)
        made = self._put(block)
        return _Looked((made, encode_s), time.perf_counter() - started)

    async def _write(self, pending: Pending, block: CachedBlock) -> bool:
        path = _path(pending.folder, pending.key)
        writing = asyncio.ensure_future(self._in_writer(self._write_file, path, block, pending))
        done, _ = await asyncio.wait([writing], timeout=_SLOW_WRITE_S)
        if not done:
            self._warnings.warn("writing", f"the volume has taken longer than {_SLOW_WRITE_S:g} s to write a block")
        written: bool = await writing
        if pending.purged:  # perhaps by a purge that gave up
            await self._in_writer(self._volume.remove, path)
            return False
        return written

    def _write_file(self, path: str, block: CachedBlock, pending: Pending) -> bool:
        return self._volume.write(path, packed(block, pending.tenant, pending.form, pending.encode_s))

    def _remove(self, path: str) -> None:
        try:
            self._volume.remove(path)
        except OSError as error:
            _logger.info("a block's file on the volume was not removed: %s", error)

    async def _in_writer(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._writer, call, *arguments)


def _path(folder: str, key: str) -> str:
    return f"{folder}/{key}"


def _nothing() -> None:
    pass
