"""A typed asyncio client of the gateway.

::

    async with BlockragClient("127.0.0.1:9000") as client:
        await client.ingest_file("handbook.pdf")
        answer = await client.ask("Who signs an invoice?")
        print(answer.text, [citation.title for citation in answer.completion.citations if citation.in_prompt])

Every method raises the errors of ``blockrag.errors``. What a replica or a proxy that went away leaves unanswered is
sent again, with growing pauses and within the call's time, where that is safe: reads, questions before their first
text (``ask``: also after it), ingests (the same content is the same version) and deletions. Imports neither Ray nor
torch.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import grpc

from blockrag import client_messages as messages
from blockrag.alike import alike
from blockrag.client_calls import CallSpan, Patience, open_channel, start_call, translated
from blockrag.errors import DeadlineError, NotFoundError, OverloadedError, UnavailableError
from blockrag.results import (
    Answer,
    Collection,
    Completion,
    DeletedCollection,
    DeletedDocument,
    DeletedSource,
    Description,
    Document,
    Filter,
    GenerateOptions,
    IngestedDocument,
    IngestOptions,
    Passage,
    Retrieved,
    TextChunk,
    TraceSpan,
    WarmProgress,
)
from blockrag.v1 import corpus_pb2, corpus_pb2_grpc, rag_pb2_grpc, system_pb2, system_pb2_grpc

DEFAULT_TIMEOUT_S = 120.0
DEFAULT_PATIENCE_S = 15.0
"""Longer than a decoder takes to be replaced."""
_STUBS: dict[str, Any] = {
    "RagService": rag_pb2_grpc.RagServiceStub,
    "CorpusService": corpus_pb2_grpc.CorpusServiceStub,
    "SystemService": system_pb2_grpc.SystemServiceStub,
}
_TLS_SCHEME = "grpcs://"
_GRACE_S = 1.0  # the server's own deadline error should arrive before gRPC's
_KEPT_SPANS = 1024
_POLL_S = 0.2


class BlockragClient:
    """One connection, shared by any number of concurrent calls. Use it as an async context manager, or ``close`` it."""

    def __init__(
        self,
        target: str = "127.0.0.1:9000",
        api_key: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        patience_s: float = DEFAULT_PATIENCE_S,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """``target``: host:port of the gRPC ingress, or ``grpcs://host:port`` of a proxy that speaks TLS.

        ``timeout_s`` is for calls that name none; ingest and warm have none at all. ``patience_s``: how long a call is
        sent again after it met with ``UnavailableError``, an ingest or a warming also where it was refused with
        ``OverloadedError`` and may come back by then; 0: never. ``credentials`` (``grpc.ssl_channel_credentials``)
        speak TLS with roots or a certificate of one's own; without them ``grpcs://`` trusts gRPC's roots, which
        ``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`` replaces.
        """
        self.target = target.removeprefix(_TLS_SCHEME)
        if credentials is None and target.startswith(_TLS_SCHEME):
            credentials = grpc.ssl_channel_credentials()
        self._credentials = credentials
        self._patience_s = patience_s
        self._timeout_s = messages.checked_timeout(timeout_s)
        self._metadata: tuple[tuple[str, str], ...] = (("application", "gateway"),)
        if api_key:
            self._metadata += (("authorization", f"Bearer {api_key}"),)
        self._spans: deque[CallSpan] = deque(maxlen=_KEPT_SPANS)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> BlockragClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and the calls on it."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def generate(
        self, question: str, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Retrieved | TextChunk | Completion, None]:
        """Streams an answer: Retrieved, text chunks (each a ``str``), Completion. Closing the stream stops the work.

        When the question had to be sent again and other passages were found meanwhile, there is a second Retrieved.
        """
        patience = Patience(self._patience_s, messages.checked_timeout(options.get("timeout_s", self._timeout_s)))
        retrieved: Retrieved | None = None
        answering = False
        while True:
            try:
                async with aclosing(self._generate_once(question, patience.left_s, options)) as events:
                    async for event in events:
                        if isinstance(event, Retrieved):
                            if event == retrieved:
                                continue
                            retrieved = event
                        else:
                            answering = True
                        yield event
                return
            except UnavailableError as error:
                if answering:
                    raise
                await patience.pause(error)

    async def _generate_once(
        self, question: str, timeout_s: float, options: GenerateOptions
    ) -> AsyncGenerator[Retrieved | TextChunk | Completion, None]:
        request = messages.generate_request(question, timeout_s, dict(options))
        completion: Completion | None = None
        async with aclosing(self._stream("RagService/Generate", request, timeout_s + _GRACE_S)) as answered:
            async for message in answered:
                event = messages.event(message)
                if isinstance(event, Completion):
                    completion = event
                else:
                    yield event
        # Last, and outside the call's span: whoever takes it leaves, and the span would say that it was cancelled.
        if completion is not None:
            yield completion

    async def ask(self, question: str, **options: Unpack[GenerateOptions]) -> Answer:
        """The whole answer at once."""
        patience = Patience(self._patience_s, messages.checked_timeout(options.get("timeout_s", self._timeout_s)))
        started = time.perf_counter()
        while True:
            try:
                return await self._ask_once(question, patience.left_s, options, started)
            except UnavailableError as error:
                await patience.pause(error)

    async def _ask_once(self, question: str, timeout_s: float, options: GenerateOptions, started: float) -> Answer:
        passages: tuple[Passage, ...] = ()
        first_ms = 0.0
        async with aclosing(self._generate_once(question, timeout_s, options)) as events:
            async for event in events:
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
        response = await self._send("RagService/Retrieve", request)
        return tuple(messages.passage(found) for found in response.passages)

    async def ingest_file(
        self, path: str | Path, *, document_id: str = "", **options: Unpack[IngestOptions]
    ) -> tuple[IngestedDocument, ...]:
        """Streams a file in. ``document_id`` empty: the file's name. Several documents for a jsonl file.

        Raises ``OSError`` when the file cannot be read here.
        """
        with Path(path).open("rb") as file:  # noqa: ASYNC230  (opening is instant, reading is done in a thread)
            header = messages.header(document_id or Path(path).name, **options)
            return await self._ingest(header, lambda: messages.file_pieces(file))

    async def ingest_bytes(
        self, document_id: str, content: bytes, **options: Unpack[IngestOptions]
    ) -> tuple[IngestedDocument, ...]:
        """Stores a document; without ``media_type``: by the id's suffix."""
        header = messages.header(document_id, **options)
        return await self._ingest(header, lambda: messages.byte_pieces(content))

    async def ingest_text(self, document_id: str, text: str, **options: Unpack[IngestOptions]) -> IngestedDocument:
        """Stores a text; without ``media_type``: plain."""
        header = messages.header(document_id, **{"media_type": "text/plain", **options})
        content = messages.encoded(text)
        (document,) = await self._ingest(header, lambda: messages.byte_pieces(content))
        return document

    async def delete_document(self, document_id: str, *, collection: str = "") -> DeletedDocument:
        """Removes a document, its passages and their KV; ``NotFoundError`` when there is none.

        Nothing is counted when an attempt whose answer was lost has removed it.
        """
        request = messages.made(corpus_pb2.DeleteDocumentRequest, collection=collection, document_id=document_id)
        gone = corpus_pb2.DeleteDocumentResponse()
        response = await self._send("CorpusService/DeleteDocument", request, gone)
        return alike(DeletedDocument, response)

    async def delete_source(self, source: str, *, collection: str = "") -> DeletedSource:
        """Removes all documents that came from a source; ``NotFoundError`` when there is none.

        What an attempt whose answer was lost has removed is not counted.
        """
        request = messages.made(corpus_pb2.DeleteSourceRequest, collection=collection, source=source)
        # As long as it takes: there may be many.
        gone = corpus_pb2.DeleteSourceResponse()
        response = await self._send("CorpusService/DeleteSource", request, gone, timeout_s=math.inf)
        return DeletedSource(tuple(response.document_ids), response.passages, response.purged_blocks)

    async def delete_collection(self, collection: str) -> DeletedCollection:
        """Removes a collection with everything in it; ``NotFoundError`` when there is none.

        Nothing is counted when an attempt whose answer was lost has removed it.
        """
        request = messages.made(corpus_pb2.DeleteCollectionRequest, collection=collection)
        gone = corpus_pb2.DeleteCollectionResponse()
        response = await self._send("CorpusService/DeleteCollection", request, gone)
        return alike(DeletedCollection, response)

    async def list_documents(self, *, collection: str = "", page_size: int = 100) -> AsyncIterator[Document]:
        """All documents of a collection, by id, fetched page by page."""
        request = messages.made(corpus_pb2.ListDocumentsRequest, collection=collection, page_size=page_size)
        while True:
            page = await self._send("CorpusService/ListDocuments", request)
            for summary in page.documents:
                yield messages.document(summary)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def list_collections(self) -> tuple[Collection, ...]:
        """The tenant's collections, by name."""
        request = corpus_pb2.ListCollectionsRequest()
        response = await self._send("CorpusService/ListCollections", request)
        return tuple(alike(Collection, item) for item in response.collections)

    async def warm(
        self, *, collection: str = "", document_ids: Sequence[str] = (), pin: bool = False
    ) -> AsyncGenerator[WarmProgress, None]:
        """Encodes passages ahead of time; yields progress, the last with done == total.

        It begins again, with what is warm already, when it was interrupted.
        """
        request = messages.made(corpus_pb2.WarmRequest, collection=collection, document_ids=document_ids, pin=pin)
        patience, furthest = Patience(self._patience_s, math.inf), 0
        while True:
            try:
                async with aclosing(self._stream("CorpusService/Warm", request)) as steps:
                    async for step in steps:
                        if step.done > furthest:  # it got on: what goes away an hour later is waited for anew
                            patience, furthest = Patience(self._patience_s, math.inf), step.done
                        yield alike(WarmProgress, step)
                return
            except (UnavailableError, OverloadedError) as error:
                await patience.pause(error)

    async def describe(self, *, timeout_s: float | None = None) -> Description:
        """The bundle, the limits and every service's state."""
        describe = self._method("SystemService/Describe")
        with translated():
            response = await describe(
                system_pb2.DescribeRequest(), metadata=self._metadata, timeout=timeout_s or self._timeout_s
            )
        return messages.description(response)

    async def trace(self, trace_id: str, *, wait_s: float = 3.0) -> tuple[TraceSpan, ...]:
        """A request's spans in order of their start, this client's own among them.

        Services write their spans a moment after the answer: waits until no more come, for at most ``wait_s``.
        ``NotFoundError`` when there is none.
        """
        get_trace = self._method("SystemService/GetTrace")
        request = messages.made(system_pb2.GetTraceRequest, trace_id=trace_id)
        spans: list[TraceSpan] = []
        until = time.monotonic() + wait_s
        while True:
            seen = len(spans)
            try:
                with translated():
                    response = await get_trace(request, metadata=self._metadata, timeout=self._timeout_s)
                spans = [alike(TraceSpan, span, attributes=dict(span.attributes)) for span in response.spans]
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
            except (UnavailableError, OverloadedError, DeadlineError) as error:
                # What gets better by waiting; a wrong key, for instance, does not.
                missing = str(error)
            if time.monotonic() >= until:
                raise UnavailableError(f"{self.target} is not ready after {timeout_s:g} s: {missing}")
            await asyncio.sleep(_POLL_S)

    async def _ingest(
        self, header: corpus_pb2.DocumentHeader, pieces: Callable[[], AsyncIterator[bytes]]
    ) -> tuple[IngestedDocument, ...]:
        broken: list[OSError] = []

        async def requests() -> AsyncIterator[corpus_pb2.IngestDocumentRequest]:
            yield corpus_pb2.IngestDocumentRequest(header=header)
            try:
                async for piece in pieces():
                    yield corpus_pb2.IngestDocumentRequest(content=piece)
            except OSError as error:
                broken.append(error)
                raise

        patience = Patience(self._patience_s, math.inf)
        while True:
            try:
                with self._call("CorpusService/IngestDocument") as call:
                    response = await call(requests())
                return tuple(messages.ingested(document) for document in response.documents)
            except (UnavailableError, OverloadedError) as error:
                await patience.pause(error)
            except asyncio.CancelledError:
                # gRPC cancels a call whose requests it cannot have, and does not say why.
                if broken:
                    raise broken[0] from None
                raise

    async def _send(self, method: str, request: Any, gone: Any = None, *, timeout_s: float | None = None) -> Any:
        """The answer to a call that may happen twice. ``gone``: to one that finds nothing, after an attempt whose
        answer was lost."""
        patience = Patience(self._patience_s, self._timeout_s if timeout_s is None else timeout_s)
        while True:
            try:
                with self._call(method) as call:
                    return await call(request, timeout=patience.left_s if patience.left_s < math.inf else None)
            except UnavailableError as error:
                await patience.pause(error)
            except NotFoundError:
                if gone is None or not patience.failed:
                    raise
                return gone

    def _connected(self) -> grpc.aio.Channel:
        # Made here and not in __init__: a channel belongs to the event loop it is made in.
        if self._channel is None:
            self._channel = open_channel(self.target, self._credentials)
        return self._channel

    def _method(self, name: str) -> Any:
        service, _, method = name.partition("/")
        return getattr(_STUBS[service](self._connected()), method)

    @contextmanager
    def _call(self, method: str) -> Iterator[Any]:
        with start_call(method, self._spans) as traceparent, translated():
            yield partial(self._method(method), metadata=(*self._metadata, ("traceparent", traceparent)))

    async def _stream(self, method: str, request: Any, timeout_s: float | None = None) -> AsyncGenerator[Any, None]:
        with self._call(method) as start:
            call = start(request, timeout=timeout_s)
            try:
                async for message in call:
                    yield message
            finally:
                call.cancel()
