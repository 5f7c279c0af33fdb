"""A volume behind the local disks: what any system with the same bundle and secret encoded, the others read.

Nothing is known of what is there: a block is looked for under the document that it is asked for, its file's name is its
key, and a file is checked as those on disk are. Blocks of no document are not kept there, since no purge would reach
them. Nothing is evicted.

Load or encode: reading, and encoding here, are measured by tokens, for each form: a file's size is known only once it
was read, and what it cost was another's machine.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from blockrag.errors import DataError, UnavailableError
from blockrag.kv_cache.block_files import folder_of, most_header_bytes, packed, purged_folder, unpacked
from blockrag.kv_cache.file_tier import FileTier, Loaded
from blockrag.kv_cache.pace import Pace
from blockrag.kv_cache.shard_messages import DocumentId, EncodedObject
from blockrag.kv_cache.volume import Volume
from blockrag.kv_cache.write_behind import Pending, ReadObject
from blockrag.types import BlockForm, BlockRequest, CachedBlock

PURGE_TIMEOUT_S = 20.0
_SLOW_WRITE_S = 30.0
"""A write that takes longer is a warning."""
_READERS = 8
"""A volume's answers take longer than a disk's, but many can be on their way."""


class VolumeTier(FileTier):
    """One shard's way to the volume."""

    def __init__(self, volume: Volume, *, put: Callable[[CachedBlock], EncodedObject], read: ReadObject) -> None:
        """Waits for nothing and raises nothing. ``put`` makes an object of a block, in a thread."""
        self._volume = volume
        super().__init__("volume", _READERS, self._write, put=put, read=read, connect=volume.open)
        self._encoding: defaultdict[BlockForm, Pace] = defaultdict(Pace)
        # so that the first question does not wait for a package or a connection
        self._readers.submit(volume.open)

    async def load(self, request: BlockRequest, document: DocumentId) -> Loaded | None:
        """The block's file; None: there is none of use, encoding is quicker, or the volume does not answer in time."""
        if not document.named:
            return None
        tokens, path = request.token_ids.size, f"{folder_of(document)}/{request.key}"
        encode_s = self._encoding[request.form].expected(tokens)
        try:
            return await self._read(request, lambda: unpacked(self._volume.read(path), request), tokens, encode_s)
        except DataError:
            self._later(self._volume.remove, path)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._pause()  # it fails as a whole, where a disk fails file by file
        return None

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

    async def _write(self, pending: Pending, block: CachedBlock) -> bool:
        path = f"{pending.folder}/{pending.key}"
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
