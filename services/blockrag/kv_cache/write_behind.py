"""Blocks that wait to be written: a bounded queue, so that no request waits for a disk or a volume."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from blockrag.aio import detached
from blockrag.kv_cache.shard_messages import EncodedObject
from blockrag.limits import MIB
from blockrag.types import BlockForm, BlockRequest, CachedBlock

MOST_PENDING_BYTES = 64 * MIB
"""Blocks that wait to be written: what is more is not written. They stay in the object store meanwhile."""
RETRY_S = 30.0
"""After a write failed none is tried for so long."""

_logger = logging.getLogger(__name__)

ReadObject = Callable[[Any], Awaitable[CachedBlock | None]]
"""The block of an object; None if it was lost."""


class Warnings:
    """What an operator should know, by what it concerns; logged when it is new."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def warn(self, concern: str, text: str) -> None:
        """Something is wrong, in place of what was wrong with the same before."""
        if self._texts.get(concern) != text:
            _logger.warning(text)
        self._texts[concern] = text

    def over(self, concern: str) -> None:
        """It is well again."""
        self._texts.pop(concern, None)

    def texts(self) -> tuple[str, ...]:
        """All that hold."""
        return tuple(self._texts.values())


@dataclass(eq=False)
class Pending:
    """A block that waits to be written."""

    key: str
    ref: Any
    nbytes: int
    """At most those of its file."""
    tenant: str
    folder: str
    form: BlockForm
    encode_s: float
    purged: bool = False


class WriteBehind:
    """Blocks in the order in which they came, written one after the other. All calls on one event loop."""

    def __init__(
        self,
        where: str,
        write: Callable[[Pending, CachedBlock], Awaitable[bool]],
        *,
        read: ReadObject,
        warnings: Warnings,
    ) -> None:
        """``write`` writes a block, with ``mutating`` held, and says whether it did; its ``OSError`` is a warning."""
        self.mutating = asyncio.Lock()
        """Held while a block is written; a purge's removal of files waits for it."""
        self.nbytes = 0
        self.written = 0
        self.dropped = 0
        self._where = where
        self._write = write
        self._read = read
        self._warnings = warnings
        self._pending: dict[str, Pending] = {}
        self._writing: asyncio.Task[None] | None = None
        self._paused_until = 0.0

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def paused(self) -> bool:
        """Whether a write failed a moment ago."""
        return time.monotonic() < self._paused_until

    def get(self, key: str) -> Pending | None:
        """The block of this key, while it waits or is written."""
        return self._pending.get(key)

    def offer(self, request: BlockRequest, encoded: EncodedObject, nbytes: int, folder: str, encode_s: float) -> None:
        """Has a block of which ``nbytes`` may be written put into a folder, unless there is no room or no use."""
        key = request.key
        if key in self._pending:
            return
        if self.paused:
            self.dropped += 1
            return
        if self.nbytes + nbytes > MOST_PENDING_BYTES:
            self.dropped += 1
            self._warnings.warn("pace", f"{self._where} is slower than the encoder: blocks were not written")
            return
        self._pending[key] = Pending(key, encoded.ref, nbytes, request.tenant, folder, request.form, encode_s)
        self.nbytes += nbytes
        if self._writing is None or self._writing.done():
            self._writing = detached(self._write_all())

    def forget(self, folder: str) -> set[str]:
        """None of what is meant for a folder, or one below it, is written from now on; its keys."""
        purged = [
            pending
            for pending in self._pending.values()
            if not pending.purged and (pending.folder == folder or pending.folder.startswith(f"{folder}/"))
        ]
        for pending in purged:
            pending.purged = True
        return {pending.key for pending in purged}

    async def settled(self) -> None:
        """Returns when nothing waits to be written."""
        while self._writing is not None and not self._writing.done():
            await asyncio.shield(self._writing)

    async def _write_all(self) -> None:
        while self._pending:
            pending = next(iter(self._pending.values()))
            try:
                await self._write_one(pending)
            except Exception:
                _logger.exception("a block was not written")
                self.dropped += 1
            finally:
                del self._pending[pending.key]
                self.nbytes -= pending.nbytes
        self._warnings.over("pace")

    async def _write_one(self, pending: Pending) -> None:
        if pending.purged:
            return
        if self.paused:
            self.dropped += 1
            return
        block = await self._read(pending.ref)
        if block is None:
            return
        async with self.mutating:
            if pending.purged:
                return
            try:
                self.written += await self._write(pending, block)
            except OSError as error:
                self._paused_until = time.monotonic() + RETRY_S
                self.dropped += 1
                self._warnings.warn("writing", f"blocks cannot be written to {self._where}: {error}")
            else:
                self._warnings.over("writing")
