"""A typed asyncio client of the gateway.

::

    async with BlockragClient("127.0.0.1:9000") as client:
        await client.ingest_file("handbook.pdf")
        answer = await client.ask("Who signs an invoice?")
        print(answer.text, [citation.title for citation in answer.completion.citations if citation.in_prompt])

Every method raises the errors of ``blockrag.errors``. Imports neither Ray nor torch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypedDict, Unpack

import grpc

from blockrag import client_messages as messages
from blockrag.client_calls import CallSpan, start_call, translated
from blockrag.errors import BlockragError, NotFoundError, UnavailableError
from blockrag.results import (
    Answer,
    AttentionModeName,
    Collection,
    Completion,
    Compression,
    Condition,
    DeletedCollection,
    DeletedDocument,
    Description,
    Document,
    GivenPassage,
    IngestedDocument,
    Passage,
    Retrieved,
    TextChunk,
    TraceSpan,
    WarmProgress,
)
from blockrag.v1 import corpus_pb2, corpus_pb2_grpc, rag_pb2_grpc, system_pb2, system_pb2_grpc

DEFAULT_TIMEOUT_S = 120.0
_TLS_SCHEME = "grpcs://"
_GRACE_S = 1.0  # the server's own deadline error should arrive before gRPC's
_PIECE_BYTES = 512 * 1024
_MESSAGE_BYTES = 64 * 2**20
_KEPT_SPANS = 1024
_POLL_S = 0.2

Filter = Mapping[str, str | float | bool] | Sequence[Condition]
"""Conditions, or fields and the values that they must have."""


class GenerateOptions(TypedDict, total=False):
    """Options of a question; what is left out is the server's default."""

    collection: str
    top_k: int
    filter: Filter
    attention_mode: AttentionModeName
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]
    timeout_s: float
    max_context_tokens: int
    passages: Sequence[GivenPassage]
    compression: Compression


class BlockragClient:
    """One connection, shared by any number of concurrent calls. Use it as an async context manager, or ``close`` it."""

    def __init__(
        self,
        target: str = "127.0.0.1:9000",
        api_key: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """``target``: host:port of the gRPC ingress, or ``grpcs://host:port`` of a proxy that speaks TLS.

        ``timeout_s`` is for calls that name none; ingest and warm have none at all. ``credentials``
        (``grpc.ssl_channel_credentials``) speak TLS with roots or a certificate of one's own; without them
        ``grpcs://`` trusts gRPC's roots, which ``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`` replaces.
        """
        self.target = target.removeprefix(_TLS_SCHEME)
        if credentials is None and target.startswith(_TLS_SCHEME):
            credentials = grpc.ssl_channel_credentials()
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._metadata: tuple[tuple[str, str], ...] = (("application", "gateway"),)
        if api_key:
            self._metadata += (("authorization", f"Bearer {api_key}"),)
        self._spans: deque[CallSpan] = deque(maxlen=_KEPT_SPANS)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> BlockragClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and the calls on it."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def generate(
        self, question: str, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Retrieved | TextChunk | Completion, None]:
        """Streams an answer: Retrieved, text chunks (each a ``str``), Completion. Closing the stream stops the work."""
        timeout_s = options.get("timeout_s", self._timeout_s)
        request = messages.generate_request(question, timeout_s, dict(options))
        completion: Completion | None = None
        with self._call("RagService/Generate") as metadata:
            stub = self._stub(rag_pb2_grpc.RagServiceStub)
            call = stub.Generate(request, metadata=metadata, timeout=timeout_s + _GRACE_S)
            try:
                async for message in call:
                    event = messages.event(message)
                    if isinstance(event, Completion):
                        completion = event
                    else:
                        yield event
            finally:
                call.cancel()
        # Last, and outside the call's span: whoever takes it leaves, and the span would say that it was cancelled.
        if completion is not None:
            yield completion

    async def ask(self, question: str, **options: Unpack[GenerateOptions]) -> Answer:
        """The whole answer at once."""
        started = time.perf_counter()
        passages: tuple[Passage, ...] = ()
        first_ms = 0.0
        async for event in self.generate(question, **options):
            if isinstance(event, Retrieved):
                passages = event.passages
            elif isinstance(event, Completion):
                return Answer(event.answer, passages, event, first_ms)
            elif not first_ms:
                first_ms = (time.perf_counter() - started) * 1000
        raise UnavailableError("the answer ended without its completion; ask again")

    async def retrieve(
        self, query: str, *, collection: str = "", top_k: int | None = None, filter: Filter = ()
    ) -> tuple[Passage, ...]:
        """Passages, best first, without an answer."""
        request = messages.retrieve_request(query, collection, top_k, filter)
        with self._call("RagService/Retrieve") as metadata:
            stub = self._stub(rag_pb2_grpc.RagServiceStub)
            response = await stub.Retrieve(request, metadata=metadata, timeout=self._timeout_s)
        return tuple(messages.passage(found) for found in response.passages)

    async def ingest_file(
        self,
        path: str | Path,
        *,
        collection: str = "",
        document_id: str = "",
        title: str = "",
        media_type: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> tuple[IngestedDocument, ...]:
        """Streams a file in. ``document_id`` empty: the file's name. Several documents for a jsonl file.

        Raises ``OSError`` when the file cannot be read here.
        """
        with Path(path).open("rb") as file:  # noqa: ASYNC230  (opening is instant, reading is done in a thread)
            header = messages.header(collection, document_id or Path(path).name, title, media_type, metadata)
            return await self._ingest(header, _file_pieces(file))

    async def ingest_bytes(
        self,
        document_id: str,
        content: bytes,
        *,
        collection: str = "",
        title: str = "",
        media_type: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> tuple[IngestedDocument, ...]:
        """Stores a document; ``media_type`` empty: by the id's suffix."""
        header = messages.header(collection, document_id, title, media_type, metadata)
        return await self._ingest(header, _byte_pieces(content))

    async def ingest_text(
        self,
        document_id: str,
        text: str,
        *,
        collection: str = "",
        title: str = "",
        media_type: str = "text/plain",
        metadata: Mapping[str, Any] | None = None,
    ) -> IngestedDocument:
        """Stores a text."""
        header = messages.header(collection, document_id, title, media_type, metadata)
        (document,) = await self._ingest(header, _byte_pieces(text.encode()))
        return document

    async def delete_document(self, document_id: str, *, collection: str = "") -> DeletedDocument:
        """Removes a document, its passages and their KV; ``NotFoundError`` when there is none."""
        request = corpus_pb2.DeleteDocumentRequest(collection=collection, document_id=document_id)
        with self._call("CorpusService/DeleteDocument") as metadata:
            response = await self._corpus().DeleteDocument(request, metadata=metadata, timeout=self._timeout_s)
        return DeletedDocument(response.passages, response.purged_blocks)

    async def delete_collection(self, collection: str) -> DeletedCollection:
        """Removes a collection with everything in it; ``NotFoundError`` when there is none."""
        request = corpus_pb2.DeleteCollectionRequest(collection=collection)
        with self._call("CorpusService/DeleteCollection") as metadata:
            response = await self._corpus().DeleteCollection(request, metadata=metadata, timeout=self._timeout_s)
        return DeletedCollection(response.documents, response.passages, response.purged_blocks)

    async def list_documents(self, *, collection: str = "", page_size: int = 100) -> AsyncIterator[Document]:
        """All documents of a collection, by id, fetched page by page."""
        request = corpus_pb2.ListDocumentsRequest(collection=collection, page_size=page_size)
        while True:
            with self._call("CorpusService/ListDocuments") as metadata:
                page = await self._corpus().ListDocuments(request, metadata=metadata, timeout=self._timeout_s)
            for summary in page.documents:
                yield messages.document(summary)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def list_collections(self) -> tuple[Collection, ...]:
        """The tenant's collections, by name."""
        with self._call("CorpusService/ListCollections") as metadata:
            response = await self._corpus().ListCollections(
                corpus_pb2.ListCollectionsRequest(), metadata=metadata, timeout=self._timeout_s
            )
        return tuple(Collection(item.name, item.documents, item.passages) for item in response.collections)

    async def warm(
        self, *, collection: str = "", document_ids: Sequence[str] = (), pin: bool = False
    ) -> AsyncGenerator[WarmProgress, None]:
        """Encodes passages ahead of time; yields progress, the last with done == total."""
        request = corpus_pb2.WarmRequest(collection=collection, document_ids=document_ids, pin=pin)
        with self._call("CorpusService/Warm") as metadata:
            call = self._corpus().Warm(request, metadata=metadata)
            try:
                async for step in call:
                    yield WarmProgress(step.done, step.total, step.hits, step.encoded_bytes, step.over_budget)
            finally:
                call.cancel()

    async def describe(self, *, timeout_s: float | None = None) -> Description:
        """The bundle, the limits and every service's state."""
        stub = self._stub(system_pb2_grpc.SystemServiceStub)
        with translated():
            response = await stub.Describe(
                system_pb2.DescribeRequest(), metadata=self._metadata, timeout=timeout_s or self._timeout_s
            )
        return messages.description(response)

    async def trace(self, trace_id: str, *, wait_s: float = 3.0) -> tuple[TraceSpan, ...]:
        """A request's spans in order of their start, this client's own among them.

        Services write their spans a moment after the answer: waits until no more come, for at most ``wait_s``.
        ``NotFoundError`` when there is none.
        """
        stub = self._stub(system_pb2_grpc.SystemServiceStub)
        request = system_pb2.GetTraceRequest(trace_id=trace_id)
        spans: list[TraceSpan] = []
        until = time.monotonic() + wait_s
        while True:
            seen = len(spans)
            try:
                with translated():
                    response = await stub.GetTrace(request, metadata=self._metadata, timeout=self._timeout_s)
                spans = [messages.trace_span(span) for span in response.spans]
            except NotFoundError:
                if time.monotonic() >= until:
                    raise
            if (spans and len(spans) == seen) or time.monotonic() >= until:
                break
            await asyncio.sleep(_POLL_S)
        spans.extend(kept.span for kept in self._spans if kept.trace_id == trace_id.lower())
        return tuple(sorted(spans, key=lambda span: span.start_unix_ns))

    async def wait_until_ready(self, timeout_s: float = 60.0) -> Description:
        """Waits until every service answers; ``UnavailableError`` saying what is missing when the time is up."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                described = await self.describe(timeout_s=max(min(10.0, until - time.monotonic()), 0.1))
                if described.healthy:
                    return described
                missing = "; ".join(f"{item.name}: {item.detail}" for item in described.services if not item.healthy)
            except UnavailableError as error:
                missing = str(error)
            except BlockragError as error:
                # A wrong key, for instance, does not get better by waiting; an overload or a slow start may.
                if not messages.passes_by_itself(error):
                    raise
                missing = str(error)
            if time.monotonic() >= until:
                raise UnavailableError(f"{self.target} is not ready after {timeout_s:g} s: {missing}")
            await asyncio.sleep(_POLL_S)

    async def _ingest(
        self, header: corpus_pb2.DocumentHeader, pieces: AsyncIterator[bytes]
    ) -> tuple[IngestedDocument, ...]:
        async def requests() -> AsyncIterator[corpus_pb2.IngestDocumentRequest]:
            yield corpus_pb2.IngestDocumentRequest(header=header)
            async for piece in pieces:
                yield corpus_pb2.IngestDocumentRequest(content=piece)

        with self._call("CorpusService/IngestDocument") as metadata:
            response = await self._corpus().IngestDocument(requests(), metadata=metadata)
        return tuple(messages.ingested(document) for document in response.documents)

    def _connected(self) -> grpc.aio.Channel:
        # Made here and not in __init__: a channel belongs to the event loop it is made in.
        if self._channel is None:
            options = [
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MESSAGE_BYTES),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ]
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, options=options)
        return self._channel

    def _corpus(self) -> Any:
        return self._stub(corpus_pb2_grpc.CorpusServiceStub)

    def _stub(self, kind: Any) -> Any:
        return kind(self._connected())

    @contextmanager
    def _call(self, method: str) -> Iterator[tuple[tuple[str, str], ...]]:
        with start_call(method, self._spans) as traceparent, translated():
            yield (*self._metadata, ("traceparent", traceparent))


async def _byte_pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


async def _file_pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
        yield piece
