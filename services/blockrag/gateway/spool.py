"""A streamed document on its way to a temporary file: memory stays small whatever its size."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import BinaryIO, cast

from blockrag.errors import BlockragError, DeadlineError, InvalidRequestError
from blockrag.grpc_status import MalformedRequest
from blockrag.v1.corpus_pb2 import DocumentHeader, IngestDocumentRequest

MAX_PIECE_BYTES = 2**20
_MEMORY_BYTES = 2**20
_DRAIN_S = 5.0
_LEAST_BYTES = 2**16

Message = IngestDocumentRequest | MalformedRequest


@asynccontextmanager
async def refused_gently(stream: AsyncIterator[Message], max_bytes: int) -> AsyncIterator[None]:
    """Reads what a client still sends before an error of ours reaches it.

    A status that overtakes the client's messages is lost: its gRPC reports the failed write instead. Gives up after
    ``max_bytes`` or a few seconds.
    """
    try:
        yield
    except BlockragError:
        left = max_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                async for message in stream:
                    left -= 0 if isinstance(message, MalformedRequest) else len(message.content)
                    if left < 0:
                        break
        raise


async def while_it_moves(stream: AsyncIterator[Message], idle_s: float) -> AsyncIterator[Message]:
    """The messages of ``stream``.

    Raises ``DeadlineError`` when the next one takes longer than ``idle_s``, and when so little comes that an upload of
    any size would hold its place: less than 64 KiB in each ``idle_s`` since the start, the first not counted.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + 2 * idle_s
    while True:
        try:
            async with asyncio.timeout(idle_s):
                message = await anext(stream, None)
        except TimeoutError as error:
            raise DeadlineError(f"the upload sent nothing for {idle_s:g} s") from error
        if message is None:
            return
        if not isinstance(message, MalformedRequest):
            until += idle_s * len(message.content) / _LEAST_BYTES
        if loop.time() > until:
            raise DeadlineError(f"the upload sends less than {_LEAST_BYTES // 2**10} KiB in {idle_s:g} s")
        yield message


async def receive_header(stream: AsyncIterator[Message]) -> DocumentHeader:
    """The first message, which must be the header."""
    first = await anext(stream, None)
    if isinstance(first, MalformedRequest):
        raise first.error()
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidRequestError("header", "must be the first message")
    return first.header


async def receive_content(stream: AsyncIterator[Message], max_bytes: int) -> BinaryIO:
    """The content, in a file that is gone when it is closed; small content stays in memory.

    Raises ``InvalidRequestError`` for anything but content, an oversized piece, or more than ``max_bytes`` in all;
    then the file is closed.
    """
    file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES))  # noqa: SIM115  (the caller closes it)
    try:
        received = 0
        async for message in stream:
            if isinstance(message, MalformedRequest):
                raise message.error()
            if message.WhichOneof("part") != "content":
                raise InvalidRequestError("content", "only the first message may be a header; then comes content")
            piece = message.content
            if len(piece) > MAX_PIECE_BYTES:
                raise InvalidRequestError(
                    "content", f"a piece has {len(piece)} bytes; at most {MAX_PIECE_BYTES} are allowed"
                )
            received += len(piece)
            if received > max_bytes:
                raise InvalidRequestError(
                    "content", f"the document is larger than the {max_bytes // 2**20} MiB that are allowed"
                )
            file.write(piece)
        return file
    except BaseException:
        file.close()
        raise
