"""Parsing where it can be stopped: a few processes, each with one file at a time.

A file that takes too long or too much memory ends its process and nothing else; another process takes its place when
the next file comes. What is so small and plain that it cannot take long is parsed here: the way to a process and back
takes longer.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, BinaryIO, cast

from blockrag.errors import InvalidRequestError, UnavailableError
from blockrag.ingest.media import MediaType
from blockrag.ingest.parsing import ParsedFile, parse
from blockrag.ingest.pipeline import PreparedDocument, SourceDocument, check_source, check_spool, documents_of
from blockrag.ingest.splitting import PassageSplitter

_START_S = 60.0
_READ_BYTES = 1 << 16
_SMALL_BYTES = 1 << 20
_PLAIN_BYTES = {MediaType.TEXT: 1 << 18, MediaType.MARKDOWN: 1 << 14}
"""Files of at most so many bytes are parsed here; the worst that was found takes 0.12 s of a processor."""
_FRONT_MATTER = (b"---", b"+++")


class ParserPool:
    """Parses files in ``workers`` processes at most, started when they are needed. Belongs to one event loop."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int) -> None:
        """``timeout_s``: longest time for one file; ``memory_mb``: most memory for one, beyond the process's own."""
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._places = asyncio.Semaphore(workers)
        self._idle: list[_Worker] = []

    async def parse(
        self, spool: BinaryIO, target: BinaryIO, media_type: MediaType, metadata: Mapping[str, Any]
    ) -> ParsedFile:
        """``parsing.parse`` in a process. Both files have descriptors; ``spool``'s position moves.

        Raises ``InvalidRequestError`` as it does, and for a file that takes too long or too much memory; cancelled,
        it ends the process.
        """
        async with self._places:
            worker = await self._living() or await _Worker.start(self._timeout_s, self._memory_mb)
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await worker.ask(
                        {"media_type": media_type.value, "metadata": dict(metadata)}, (spool.fileno(), target.fileno())
                    )
            except TimeoutError:
                await worker.end()
                raise InvalidRequestError(
                    "content", f"reading it takes longer than the {self._timeout_s:g} s that are allowed"
                ) from None
            except BaseException:
                await worker.end()
                raise
            if answer is None or "ended" in answer:
                status = await worker.end()
                raise InvalidRequestError("content", self._died(answer, status))
            self._idle.append(worker)
        if "problem" in answer:
            raise InvalidRequestError(answer["field"], answer["problem"])
        return ParsedFile(**answer)

    @asynccontextmanager
    async def prepare(
        self, spool: BinaryIO, source: SourceDocument, splitter: PassageSplitter
    ) -> AsyncIterator[Iterator[PreparedDocument]]:
        """The documents of one received file: one, or one for each line of a jsonl file; making passages blocks.

        Consume a document's passages before the next document, or not at all. Raises ``InvalidRequestError`` naming the
        field: ``document_id``, ``media_type``, ``metadata`` or ``content``.
        """
        checked = check_source(source)
        size = check_spool(spool)
        if _is_plain(spool, size, checked.media_type):
            plain = io.BytesIO()
            parsed = await asyncio.to_thread(parse, spool, plain, checked.media_type, checked.source.metadata)
            yield documents_of(parsed, plain, checked, splitter)
            return
        with _with_descriptor(spool, size) as file, _scratch(size) as text:
            parsed = await self.parse(file, text, checked.media_type, checked.source.metadata)
            yield documents_of(parsed, text, checked, splitter)

    async def close(self) -> None:
        """Ends the idle processes."""
        while self._idle:
            await self._idle.pop().end()

    async def _living(self) -> _Worker | None:
        """An idle process; those that ended while they were idle are let go."""
        while self._idle:
            worker = self._idle.pop()
            if worker.runs:
                return worker
            await worker.end()
        return None

    def _died(self, answer: Mapping[str, Any] | None, status: int) -> str:
        if answer and answer["ended"] == "MemoryError":
            return f"reading it takes more than the {self._memory_mb} MiB of memory that are allowed"
        if answer and answer["ended"] == "RecursionError":
            return "it is nested too deeply to be read"
        if answer:
            return f"it holds more text than the {self._memory_mb} MiB that are allowed"
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return (
            f"the parser ended while it read it ({how}): the file is damaged, or takes more than the "
            f"{self._memory_mb} MiB of memory that are allowed"
        )


class _Worker:
    """One process and the socket to it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process = process
        self._connection = connection

    @classmethod
    async def start(cls, timeout_s: float, memory_mb: int) -> _Worker:
        """Raises ``UnavailableError`` when the process does not come up."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.to_thread(_start, theirs.fileno(), timeout_s, memory_mb)
        worker = cls(process, ours)
        try:
            async with asyncio.timeout(_START_S):
                ready = await worker._read()
        except BaseException as error:
            await worker.end()
            if isinstance(error, TimeoutError):
                raise UnavailableError("the parser of documents does not start") from None
            raise
        if ready is None:
            raise UnavailableError(f"the parser of documents does not start (status {await worker.end()})")
        return worker

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    async def ask(self, request: Mapping[str, Any], descriptors: tuple[int, int]) -> dict[str, Any] | None:
        """The answer; None when the process ended instead."""
        data = json.dumps(request).encode() + b"\n"
        try:
            sent = socket.send_fds(self._connection, [data], list(descriptors))
            await asyncio.get_running_loop().sock_sendall(self._connection, data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            return None
        return await self._read()

    async def end(self) -> int:
        """Kills it; gives its status."""
        self._connection.close()
        self._process.kill()
        return await asyncio.shield(asyncio.to_thread(self._process.wait))

    async def _read(self) -> dict[str, Any] | None:
        loop = asyncio.get_running_loop()
        received = b""
        while not received.endswith(b"\n"):
            try:
                data = await loop.sock_recv(self._connection, _READ_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            received += data
        answer: dict[str, Any] = json.loads(received)
        return answer


def _start(descriptor: int, timeout_s: float, memory_mb: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "blockrag.ingest.worker", str(descriptor), str(timeout_s), str(memory_mb)],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # The package is found where this process found it, whatever the environment says.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _is_plain(spool: BinaryIO, size: int, media_type: MediaType) -> bool:
    """Bounded by its size alone. Front matter is YAML or TOML, which is read in a process."""
    if size > _PLAIN_BYTES.get(media_type, 0):
        return False
    spool.seek(0)
    return media_type is MediaType.TEXT or not spool.read(16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_FRONT_MATTER)


@contextmanager
def _with_descriptor(spool: BinaryIO, size: int) -> Iterator[BinaryIO]:
    """A file with a descriptor: a large one has one; of a small one a copy in memory, because files on a disk take
    milliseconds to make."""
    spool.seek(0)
    if size > _SMALL_BYTES:
        spool.flush()
        yield spool
        return
    with _scratch(size) as copy:
        shutil.copyfileobj(spool, copy)
        copy.flush()
        yield copy


def _scratch(size: int) -> BinaryIO:
    """An empty file that is gone when it is closed; in memory where about ``size`` bytes are small."""
    if size > _SMALL_BYTES or not hasattr(os, "memfd_create"):
        return cast(BinaryIO, tempfile.TemporaryFile())
    return cast(BinaryIO, os.fdopen(os.memfd_create("blockrag"), "w+b"))
