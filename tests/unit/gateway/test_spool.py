"""Streamed bytes to a file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from blockrag.errors import DeadlineError, InvalidRequestError
from blockrag.gateway.corpus import Message, receive_content, receive_header, refused_gently, while_it_moves
from blockrag.grpc_status import MalformedRequest
from blockrag.v1.corpus_pb2 import DocumentHeader, IngestDocumentRequest

HEADER = IngestDocumentRequest(header=DocumentHeader(document_id="a.txt"))


def piece(content: bytes) -> IngestDocumentRequest:
    return IngestDocumentRequest(content=content)


async def stream(*messages: Message) -> AsyncIterator[Message]:
    for message in messages:
        yield message


async def test_header_then_content() -> None:
    messages = stream(HEADER, *[piece(b"ab" * 1000)] * 3000)
    assert (await receive_header(messages)).document_id == "a.txt"
    with await receive_content(messages, 2**23) as file:
        assert file.seek(0, 2) == 6_000_000
        file.seek(0)
        assert file.read(4) == b"abab"


async def test_no_content_is_an_empty_file() -> None:
    with await receive_content(stream(), 10) as file:
        assert file.seek(0, 2) == 0


@pytest.mark.parametrize("first", [[], [piece(b"x")], [IngestDocumentRequest()]])
async def test_the_first_message_must_be_the_header(first: list[IngestDocumentRequest]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await receive_header(stream(*first))
    assert refused.value.field == "header"


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([piece(b"x" * 6), piece(b"x" * 6)], "larger"),
        ([HEADER], "header"),
        ([piece(b"x" * (2**20 + 1))], "piece"),
        ([MalformedRequest("bad UTF-8")], "bad UTF-8"),
    ],
)
async def test_bad_content(messages: list[Message], what: str) -> None:
    with pytest.raises(InvalidRequestError, match=what):
        await receive_content(stream(*messages), 10)


async def test_the_rest_is_read_before_a_refusal() -> None:
    messages = stream(*[piece(b"x" * 10)] * 5)
    with pytest.raises(InvalidRequestError):
        async with refused_gently(messages, 1000):
            await receive_content(messages, 15)
    assert await anext(messages, None) is None


async def test_but_not_without_end() -> None:
    messages = stream(*[piece(b"x" * 10)] * 50)
    with pytest.raises(InvalidRequestError):
        async with refused_gently(messages, 100):
            await receive_content(messages, 15)
    assert await anext(messages, None) is not None


async def test_other_errors_pass_at_once() -> None:
    messages = stream(*[piece(b"x" * 10)] * 2)
    with pytest.raises(ZeroDivisionError):
        async with refused_gently(messages, 100):
            raise ZeroDivisionError
    assert await anext(messages, None) is not None


async def test_an_upload_that_stands_still_is_ended() -> None:
    async def stalling() -> AsyncIterator[Message]:
        yield HEADER
        yield piece(b"x")
        await asyncio.Event().wait()

    messages = while_it_moves(stalling(), 0.05)
    assert (await receive_header(messages)).document_id == "a.txt"
    with pytest.raises(DeadlineError, match=r"sent nothing for 0\.05 s"):
        await receive_content(messages, 10)


async def test_an_upload_that_trickles_is_ended() -> None:
    """Row B1: no upload holds its place by a byte now and then."""

    async def trickling() -> AsyncIterator[Message]:
        yield HEADER
        while True:
            await asyncio.sleep(0.02)
            yield piece(b"x")

    messages = while_it_moves(trickling(), 0.1)
    await receive_header(messages)
    async with asyncio.timeout(5):
        with pytest.raises(DeadlineError, match=r"less than 64 KiB in 0\.1 s"):
            await receive_content(messages, 10_000_000)


async def test_an_upload_that_moves_may_take_its_time() -> None:
    async def slow() -> AsyncIterator[Message]:
        for _ in range(5):
            await asyncio.sleep(0.02)
            yield piece(b"x")

    with await receive_content(while_it_moves(slow(), 5.0), 10) as file:
        assert file.seek(0, 2) == 5
