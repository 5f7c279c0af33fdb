"""Calls through handles, which are written by hand here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from typing import Any

import pytest

from blockrag.errors import NotFoundError, ReplicaLostError, UnavailableError
from blockrag.handles import (
    CompressorClient,
    DecoderClient,
    EncoderClient,
    KvCacheClient,
    RemoteService,
    RetrieverClient,
    Rpc,
)
from blockrag.http.door import RemoteGateway
from blockrag.services import SERVICES
from blockrag.v1 import (
    compressor_pb2,
    corpus_pb2,
    decoder_pb2,
    encoder_pb2,
    kv_cache_pb2,
    rag_pb2,
    retriever_pb2,
    system_pb2,
)
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse, PrepareQuestionRequest
from blockrag.v1.decoder_pb2 import DecodeFinish, DecodeRequest, DecodeResponse
from blockrag.v1.retriever_pb2 import RemoveDocumentRequest, RemoveDocumentResponse, SearchRequest, SearchResponse

METHODS = {
    service.name: service.methods
    for module in (
        *(compressor_pb2, corpus_pb2, decoder_pb2, encoder_pb2, kv_cache_pb2, rag_pb2, retriever_pb2, system_pb2),
    )
    for service in module.DESCRIPTOR.services_by_name.values()
}
"""Of each protobuf service."""


class Response:
    """What Serve's handle gives: awaitable, cancellable."""

    def __init__(self, result: Any) -> None:
        self._result = result
        self.cancelled = False
        self.ended = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._get().__await__()

    async def _get(self) -> Any:
        if self._result is None:
            await asyncio.Event().wait()
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self._result:
            if isinstance(item, Exception):
                raise item
            yield item
        self.ended = True

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A handle whose every method gives ``result``."""

    def __init__(self, result: Any) -> None:
        self._result = result
        self.chosen: list[dict[str, Any]] = []
        self.responses: list[Response] = []

    def options(self, **options: Any) -> Handle:
        self.chosen.append(options)
        return self

    def __getattr__(self, method: str) -> Any:
        return self

    def remote(self, request: Any) -> Response:
        self.responses.append(Response(self._result))
        return self.responses[-1]


async def test_a_handle_is_found_once() -> None:
    handle = Handle(PlanResponse(prompt_tokens=3))
    found: list[str] = []

    def find(name: str) -> Handle:
        found.append(name)
        return handle

    compressor = CompressorClient(find)
    for _ in range(3):
        assert (await compressor.plan(PlanRequest())).prompt_tokens == 3
    assert found == ["compressor"]
    assert handle.chosen == [{"_by_reference": False}]


async def test_an_application_that_is_not_there_yet_is_asked_for_again() -> None:
    handle = Handle(PlanResponse())
    answers: list[Any] = [RuntimeError("no such application"), handle]

    def find(name: str) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    compressor = CompressorClient(find)
    with pytest.raises(UnavailableError, match="compressor"):
        await compressor.prepare_question(PrepareQuestionRequest())
    await compressor.prepare_question(PrepareQuestionRequest())


async def test_errors_come_as_they_are() -> None:
    with pytest.raises(NotFoundError, match="nothing"):
        await CompressorClient(lambda _: Handle(NotFoundError("nothing"))).plan(PlanRequest())
    with pytest.raises(ZeroDivisionError):
        await CompressorClient(lambda _: Handle(ZeroDivisionError())).plan(PlanRequest())


class Failing(Handle):
    """A handle whose first calls find a replica that dies."""

    def __init__(self, result: Any, lost: int) -> None:
        super().__init__(result)
        self._lost = lost

    def remote(self, request: Any) -> Response:
        result = ReplicaLostError("gone") if len(self.responses) < self._lost else self._result
        self.responses.append(Response(result))
        return self.responses[-1]


async def test_what_may_happen_twice_is_asked_again_of_another_replica() -> None:
    handle = Failing(PlanResponse(prompt_tokens=3), 2)
    assert (await CompressorClient(lambda _: handle).plan(PlanRequest())).prompt_tokens == 3
    searching = Failing(SearchResponse(), 2)
    await RetrieverClient(lambda _: searching).search(SearchRequest())
    assert len(handle.responses) == len(searching.responses) == 3


async def test_not_for_ever_and_not_what_counts_what_it_removes() -> None:
    handle = Failing(PlanResponse(), 100)
    with pytest.raises(UnavailableError, match="gone"):
        await CompressorClient(lambda _: handle).plan(PlanRequest())
    assert len(handle.responses) == 3
    removing = Failing(RemoveDocumentResponse(), 1)
    with pytest.raises(UnavailableError, match="gone"):
        await RetrieverClient(lambda _: removing).remove_document(RemoveDocumentRequest())
    assert len(removing.responses) == 1


async def test_a_cancelled_call_is_cancelled_there_too() -> None:
    handle = Handle(None)
    call = asyncio.create_task(CompressorClient(lambda _: handle).plan(PlanRequest()))
    async with asyncio.timeout(5):
        while not handle.responses:  # noqa: ASYNC110  (the fake has no event to wait for)
            await asyncio.sleep(0.001)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert handle.responses[0].cancelled


WORD = DecodeResponse(text="a", tokens=1)
END = DecodeResponse(finish=DecodeFinish())


async def test_a_stream_that_is_left_is_cancelled_there() -> None:
    handle = Handle([WORD, WORD, END])
    stream = DecoderClient(lambda _: handle).decode(DecodeRequest())
    assert (await anext(stream)).text == "a"
    await stream.aclose()
    assert handle.responses[0].cancelled


async def test_a_stream_that_said_its_finish_is_not() -> None:
    handle = Handle([WORD, END])
    stream = DecoderClient(lambda _: handle).decode(DecodeRequest())
    assert [event.HasField("finish") for event in [await anext(stream), await anext(stream)]] == [False, True]
    # read to its end, or Serve would go on counting it among what its replica does
    assert handle.responses[0].ended
    await stream.aclose()
    assert not handle.responses[0].cancelled


async def test_a_stream_that_breaks_behind_its_finish_has_said_everything() -> None:
    handle = Handle([END, ReplicaLostError("gone")])
    assert [event.HasField("finish") async for event in DecoderClient(lambda _: handle).decode(DecodeRequest())] == [
        True
    ]


async def test_a_stream_that_fails_names_the_decoder() -> None:
    handle = Handle([WORD, UnavailableError("gone")])
    stream = DecoderClient(lambda _: handle).decode(DecodeRequest())
    await anext(stream)
    with pytest.raises(UnavailableError, match="gone"):
        await anext(stream)


@pytest.mark.parametrize(
    "client", [RetrieverClient, CompressorClient, KvCacheClient, EncoderClient, DecoderClient, RemoteGateway]
)
def test_every_row_is_an_rpc_with_this_request(client: type[RemoteService]) -> None:
    (service,) = (service for service in SERVICES if service.name == getattr(client, "name", "gateway"))
    declared = {method.name: method for name in service.protobuf for method in METHODS[name]}
    rows = [row for row in vars(client).values() if isinstance(row, Rpc)]

    assert rows
    assert {row._name: row._request.DESCRIPTOR for row in rows} == {
        row._name: declared[row._name].input_type for row in rows
    }
