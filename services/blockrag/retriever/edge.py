"""The embedded index as a ``VectorIndex``: a worker process that holds it, and the wire to it."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
from collections import deque
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from blockrag.aio import forwarded
from blockrag.errors import UnavailableError
from blockrag.retriever.edge_store import EdgeStore
from blockrag.retriever.edge_worker import HEADER_BYTES, Answer, Opening, frame
from blockrag.retriever.vector_index import STAGED_FOR_S, EmbeddingInfo, VectorIndex

_logger = logging.getLogger(__name__)

_WORKER = "from blockrag.retriever.edge_worker import main; main()"
_LOCK_WAIT_S = 20.0
_STOP_WAIT_S = 10.0
HANG_S = 10.0
"""A worker that owes an answer and neither used nor wanted processor time for so long hangs, and is replaced."""
_CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class EdgeIndex(VectorIndex):
    """Collections under one directory. The worker starts with the first call, and again when it died."""

    def __init__(
        self, path: Path, embedding: EmbeddingInfo, *, lock_wait_s: float = _LOCK_WAIT_S, hang_s: float = HANG_S
    ) -> None:
        """``lock_wait_s``: how long to wait for another process to let the directory go. ``hang_s``: see ``HANG_S``."""
        self._hang_s = hang_s
        self._opening = partial(EdgeStore, path, embedding, lock_wait_s)
        self._worker: _Worker | None = None
        self._starting = asyncio.Lock()

    stage = forwarded(VectorIndex.stage)
    language = forwarded(VectorIndex.language)
    commit = forwarded(VectorIndex.commit)
    remove_document = forwarded(VectorIndex.remove_document)
    remove_collection = forwarded(VectorIndex.remove_collection)
    search = forwarded(VectorIndex.search)
    documents = forwarded(VectorIndex.documents)
    find_documents = forwarded(VectorIndex.find_documents)
    passages = forwarded(VectorIndex.passages)
    counts = forwarded(VectorIndex.counts)
    disk_bytes = forwarded(VectorIndex.disk_bytes)
    collections = forwarded(VectorIndex.collections)

    async def sweep(self, older_than_s: float = STAGED_FOR_S) -> None:
        """One collection after another, each in a call of its own: searches go between them."""
        for number in await self.call("unsettled"):
            try:
                await self.call("sweep_one", number, older_than_s)
            except UnavailableError as error:
                _logger.warning("a collection could not be swept, it is tried again: %s", error)

    async def close(self) -> None:
        if self._worker is not None:
            worker, self._worker = self._worker, None
            await worker.stop()

    async def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """What ``EdgeStore``'s method answers in the worker; what it is given must be such that it can be pickled."""
        async with self._starting:
            if self._worker is None or self._worker.gone:
                self._worker = await _Worker.start(self._opening, self._hang_s)
            worker = self._worker
        return await worker.call(methodcaller(method, *arguments, **named))


class _Worker:
    """One worker process. It answers in order, so a queue of waiting calls is all the bookkeeping."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hang_s: float,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._waiting: deque[asyncio.Future[Answer]] = deque()
        self._receiving = asyncio.create_task(self._receive())
        self._watching = asyncio.create_task(self._watch(hang_s))
        self.gone = False

    @classmethod
    async def start(cls, opening: Opening, hang_s: float) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                [sys.executable, "-c", _WORKER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = cls(process, reader, writer, hang_s)
        try:
            await worker.call(opening)
        except BaseException:
            await worker.stop()
            raise
        return worker

    async def call(self, message: object) -> Any:
        if self.gone:
            raise _stopped()
        sent = frame(message)  # first: what cannot be pickled must not wait for an answer
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._writer.write(sent)
        answer = await future
        if answer.error is not None:
            raise answer.error
        return answer.value

    async def stop(self) -> None:
        """Lets the worker make everything durable and end."""
        self.gone = True
        self._writer.close()
        self._receiving.cancel()
        self._watching.cancel()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._fail_waiting()

    async def _receive(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(HEADER_BYTES), "little")
                answer = pickle.loads(await self._reader.readexactly(size))
                future = self._waiting.popleft()
                # Whoever waited may have been cancelled meanwhile.
                if not future.done():
                    future.set_result(answer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.gone = True
            self._writer.close()
            self._fail_waiting()
        await asyncio.to_thread(self._process.wait)

    async def _watch(self, hang_s: float) -> None:
        """Kills a worker that hangs. One that computes for long, over a large index, does not."""
        seen = -1.0
        since = time.monotonic()
        while not self.gone:
            await asyncio.sleep(hang_s / 10)
            used, runnable = _movement(self._process.pid)
            # On a machine that is too busy a process may wait for its turn for long: it does not hang.
            if used != seen or runnable or not self._waiting:
                seen, since = used, time.monotonic()
            elif time.monotonic() - since >= hang_s:
                _logger.error("the vector index has not moved for %g s and is replaced", hang_s)
                self.gone = True
                self._process.kill()
                return

    def _fail_waiting(self) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(_stopped())


def _movement(pid: int) -> tuple[float, bool]:
    """Processor time that a process has used, in seconds, and whether it would use more if it were given some."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return -1.0, False
    return (int(fields[11]) + int(fields[12])) * _CLOCK_TICK_S, fields[0] == "R"


def _stopped() -> UnavailableError:
    return UnavailableError("the vector index stopped; send the request again")
