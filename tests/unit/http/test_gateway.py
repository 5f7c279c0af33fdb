"""The gateway behind a handle, which is written by hand, and behind a real gRPC port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from blockrag.access import Caller, OnBehalf
from blockrag.errors import InvalidRequestError, OverloadedError
from blockrag.http.door import RemoteGateway
from blockrag.v1 import corpus_pb2, corpus_pb2_grpc, rag_pb2
from tests.unit.test_handles import Response

CALL = OnBehalf(Caller("acme"), (("request_id", "r7"),))
TEXT = rag_pb2.GenerateResponse(text=rag_pb2.TextChunk(text="Oslo"))
END = rag_pb2.GenerateResponse(completion=rag_pb2.Completion(answer="Oslo"))


class Handle:
    """Remembers how its methods are called; each gives ``result``."""

    def __init__(self, result: Any) -> None:
        self._result = result
        self.method = ""
        self.sent: list[tuple[str, Any, Any]] = []
        self.responses: list[Response] = []

    def options(self, **options: Any) -> Handle:
        return self

    def __getattr__(self, method: str) -> Any:
        self.method = method
        return self

    def remote(self, request: Any, grpc_context: Any = None) -> Response:
        self.sent.append((self.method, request, grpc_context))
        self.responses.append(Response(self._result))
        return self.responses[-1]


async def test_calls_name_who_was_admitted() -> None:
    handle = Handle(rag_pb2.RetrieveResponse(request_id="r7"))
    gateway = RemoteGateway(lambda name: handle, "nowhere:1")
    request = rag_pb2.RetrieveRequest(query="Where?")
    assert (await gateway.retrieve(request, CALL)).request_id == "r7"
    assert handle.sent == [("Retrieve", request, CALL)]


@pytest.mark.parametrize(("read", "cancelled"), [(1, True), (2, False)])
async def test_leaving_an_answer_cancels_it(read: int, cancelled: bool) -> None:
    handle = Handle([TEXT, END])
    events = RemoteGateway(lambda name: handle, "nowhere:1").generate(rag_pb2.GenerateRequest(question="q"), CALL)
    for _ in range(read):
        await anext(events)
    await events.aclose()
    assert handle.responses[0].cancelled is cancelled
    assert handle.sent[0][0] == "Generate"


class Corpus(corpus_pb2_grpc.CorpusServiceServicer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.pieces: list[bytes] = []

    async def IngestDocument(self, request: Any, context: Any) -> corpus_pb2.IngestDocumentResponse:
        self.metadata = dict(context.invocation_metadata())
        first, *rest = [message async for message in request]
        if first.header.document_id == "busy":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "8 documents are being received; retry in 300 ms")
        if first.header.document_id == "bad":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "content: has no text")
        self.pieces = [message.content for message in rest]
        if first.header.document_id == "many.jsonl":
            many = (corpus_pb2.IngestedDocument(document_id=f"{number}", version="v" * 64) for number in range(60_000))
            return corpus_pb2.IngestDocumentResponse(documents=many)
        return corpus_pb2.IngestDocumentResponse(
            documents=[corpus_pb2.IngestedDocument(document_id=first.header.document_id)]
        )


@pytest.fixture
async def port() -> AsyncIterator[tuple[Corpus, str]]:
    corpus = Corpus()
    server = grpc.aio.server()
    corpus_pb2_grpc.add_CorpusServiceServicer_to_server(corpus, server)  # type: ignore[no-untyped-call]
    number = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield corpus, f"127.0.0.1:{number}"
    await server.stop(None)


async def pieces() -> AsyncIterator[bytes]:
    yield b"one "
    yield b"two"


async def test_an_upload_streams_with_the_client_s_own_key(port: tuple[Corpus, str]) -> None:
    corpus, target = port
    gateway = RemoteGateway(lambda name: None, target)
    header = corpus_pb2.DocumentHeader(document_id="a.txt")
    stored = await gateway.ingest(header, pieces(), "Bearer key")
    assert stored.documents[0].document_id == "a.txt"
    assert corpus.pieces == [b"one ", b"two"]
    assert (corpus.metadata["application"], corpus.metadata["authorization"]) == ("gateway", "Bearer key")
    many = await gateway.ingest(corpus_pb2.DocumentHeader(document_id="many.jsonl"), pieces(), "")
    assert len(many.documents) == 60_000  # more than the 4 MiB that gRPC takes by itself
    with pytest.raises(OverloadedError) as busy:
        await gateway.ingest(corpus_pb2.DocumentHeader(document_id="busy"), pieces(), "")
    assert busy.value.retry_after_ms == 300
    with pytest.raises(InvalidRequestError, match="no text"):
        await gateway.ingest(corpus_pb2.DocumentHeader(document_id="bad"), pieces(), "")
    assert "authorization" not in corpus.metadata
    await gateway.ingest(header, pieces(), "Bearer \xe9")  # without keys whatever is sent is let in
    assert "authorization" not in corpus.metadata
