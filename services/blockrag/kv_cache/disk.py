"""The disk below a shard's objects: blocks outlive the processes, and a restart encodes nothing anew.

Blocks are written behind the requests, from a bounded queue and by a thread of their own, and read in others. Which
shard a file belongs to follows from its key alone, so the number of shards may change. All calls on one event loop.

Load or encode: each file says how long its block took to encode, and the tier measures what reading a byte takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from blockrag.errors import DataError, UnavailableError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.block_files import (
    folder_of,
    most_header_bytes,
    move_file,
    purged_folder,
    read_block,
    remove_file,
    remove_folder,
    write_block,
)
from blockrag.kv_cache.disk_index import DiskEntry, DiskIndex, affordable, on_disk, scan, space
from blockrag.kv_cache.file_tier import FileTier, Loaded
from blockrag.kv_cache.shard_messages import DocumentId, EncodedObject
from blockrag.kv_cache.write_behind import Pending, ReadObject
from blockrag.limits import DISK_RESERVE
from blockrag.types import BlockRequest, CachedBlock
from blockrag.v1.kv_cache_pb2 import DiskUsage

_NOTE_USE_S = 60.0
"""A file's time follows its block's use at most this often."""
_READERS = 2


class DiskTier(FileTier):
    """Files of one shard's blocks, below a folder."""

    def __init__(
        self,
        root: Path,
        budget_bytes: int,
        keys: KeyMaker,
        *,
        put: Callable[[CachedBlock], EncodedObject],
        read: ReadObject,
        owns: Callable[[str], bool] = lambda _: True,
        shards: int = 1,
        tenant_share: float = 1.0,
        ttl_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Finds what is there and removes what is of no use. Raises nothing: a folder that cannot be used is a warning.

        ``put`` makes an object of a block, in a thread. ``owns`` says which keys are this shard's, ``shards`` how many
        share the disk; ``budget_bytes`` are this shard's. ``clock`` gives seconds since 1970.
        """
        super().__init__("disk", _READERS, self._write, put=put, read=read)
        self._root = root
        self._clock = clock
        self._ttl_s = ttl_s
        self._evictions = 0
        self._usable = True
        found: list[DiskEntry] = []
        try:
            found, self._rejected = scan(root, keys, owns)
            held = sum(entry.nbytes for entry in found)
            budget_bytes, warning = affordable(root, budget_bytes, held, shards)
            if warning:
                self._warnings.warn("budget", warning)
        except OSError as error:
            self._usable = False
            budget_bytes = 0
            self._warnings.warn("folder", f"blocks are not kept on disk: {error}")
        self.index = DiskIndex(budget_bytes, tenant_share)
        for entry in found:
            self._drop(self.index.make_room(entry.nbytes, entry.tenant) or ())
            if self.index.has_room(entry.nbytes, entry.tenant):
                self.index.add(entry)
            else:
                self._drop([entry])

    async def load(self, request: BlockRequest, document: DocumentId) -> Loaded | None:
        """The block's file; None: there is none of use, or encoding is quicker. One of no use is removed."""
        self._expire()
        entry = self.index.get(request.key)
        if entry is None:
            return None
        seconds = entry.encode_s
        try:
            loaded = await self._read(
                request, lambda: (read_block(self._path(entry), request), seconds), entry.nbytes, seconds
            )
        except (DataError, OSError):
            if self.index.get(request.key) is entry:
                self.index.remove(request.key)
                self._drop([entry])
            return None
        if loaded is not None:
            self.use(request.key, document)
        return loaded

    def use(self, key: str, document: DocumentId) -> bool:
        """Notes that a block was asked for, wherever it was found; False: it has no file, and none is being written."""
        entry = self.index.get(key)
        if entry is None:
            pending = self._queue.get(key)
            if pending is not None and document.named and pending.folder == _of_no_document(pending.tenant):
                pending.folder = folder_of(document)
            return pending is not None
        now = self._clock()
        self.index.touch(key, now)
        path = self._path(entry)
        if document.named and entry.folder == _of_no_document(entry.tenant):
            self._move(entry, folder_of(document))
        elif now - entry.noted_use > _NOTE_USE_S:
            entry.noted_use = now
            self._later(os.utime, path, (now, now))
        return True

    def offer(
        self, request: BlockRequest, encoded: EncodedObject, document: DocumentId, encode_s: float, *, evict: bool
    ) -> None:
        """Has a block written behind. ``evict``: others may be removed for it."""
        nbytes = on_disk(encoded.nbytes + most_header_bytes(request.token_ids.size))
        if not self._usable or request.key in self.index:
            return
        if not evict and (self._queue.paused or not self.index.has_room(nbytes + self._queue.nbytes, request.tenant)):
            return
        self._queue.offer(request, encoded, nbytes, folder_of(document), encode_s)

    def forget(self, document: DocumentId) -> set[str]:
        """From now on none of a document's blocks is read or written, nor a collection's; their keys."""
        folder = purged_folder(document)
        keys = set(self.index.below(folder))
        for key in keys:
            self.index.remove(key)
        return keys | self._queue.forget(folder)

    async def erase(self, document: DocumentId) -> None:
        """Removes a document's files, or a collection's, of all shards. Raises ``UnavailableError`` if it cannot."""
        async with self._queue.mutating:
            try:
                await self._in_writer(remove_folder, self._root, purged_folder(document))
            except OSError as error:
                raise UnavailableError(f"blocks of a purged document are still in {self._root}: {error}") from error

    def usage(self) -> DiskUsage:
        """What is on disk, and what happened there since the start."""
        self._expire()
        usage = super().usage()
        usage.blocks = len(self.index)
        usage.bytes = self.index.nbytes
        usage.budget_bytes = self.index.budget_bytes
        usage.evictions = self._evictions
        return usage

    async def _write(self, pending: Pending, block: CachedBlock) -> bool:
        evicted = self.index.make_room(pending.nbytes, pending.tenant)
        if evicted is None:
            self._queue.dropped += 1
            return False
        self._evictions += len(evicted)
        now = self._clock()
        folder = pending.folder
        path = self._root / folder / pending.key
        try:
            nbytes = on_disk(await self._in_writer(self._write_file, evicted, path, block, pending, now))
        except OSError:
            self._drop(evicted)
            raise
        if pending.purged:
            await self._in_writer(remove_file, path)
            return False
        entry = DiskEntry(pending.key, folder, nbytes, pending.tenant, pending.encode_s, now, now)
        self.index.add(entry)
        if pending.folder != folder:
            self._move(entry, pending.folder)
        return True

    def _write_file(
        self, evicted: Iterable[DiskEntry], path: Path, block: CachedBlock, pending: Pending, now: float
    ) -> int:
        for entry in evicted:
            remove_file(self._path(entry))
        free, reserve = space(self._root)
        if free - pending.nbytes < reserve:
            raise OSError(f"less than {DISK_RESERVE:.0%} of the disk are free")
        nbytes = write_block(path, block, pending.tenant, pending.form, pending.encode_s)
        os.utime(path, (now, now))
        return nbytes

    def _move(self, entry: DiskEntry, folder: str) -> None:
        """Gives to a document what belonged to none, and so to no purge."""
        path = self._path(entry)
        self.index.move(entry.key, folder)
        self._later(move_file, path, self._path(entry))

    def _expire(self) -> None:
        if self._ttl_s:
            self._drop(self.index.expire(self._clock() - self._ttl_s))

    def _drop(self, entries: Iterable[DiskEntry]) -> None:
        for entry in entries:
            self._later(remove_file, self._path(entry))

    def _path(self, entry: DiskEntry) -> Path:
        return self._root / entry.folder / entry.key


def _of_no_document(tenant: str) -> str:
    return folder_of(DocumentId(tenant, "", ""))
