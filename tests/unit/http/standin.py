"""A gateway in the test's own process: its real checks, answering and corpus, over services by hand."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import httpx
import uvicorn
from google.protobuf.message import Message

from blockrag.access import OnBehalf
from blockrag.compressor.compression_request import CompressionAbility
from blockrag.errors import BlockragError, NotFoundError
from blockrag.gateway import validation
from blockrag.gateway.answering import Answering, Deadline, Timings
from blockrag.gateway.corpus import Corpus
from blockrag.gateway.describing import Describing
from blockrag.gateway.leftovers import Leftovers
from blockrag.gateway.observing import observed, request_context
from blockrag.http.app import build_app
from blockrag.ingest.splitting import PassageSplitter
from blockrag.settings import Settings
from blockrag.v1 import corpus_pb2, rag_pb2, retriever_pb2, system_pb2
from blockrag.v1.common_pb2 import Passage
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer
from tests.unit.gateway.fakes import FakeCache, FakeDecoder, FakeIndex, FakePlanner, FakeSearcher, preparing

ABILITY = CompressionAbility("reader", 4, frozenset({"query"}))
PASSAGES = [
    Passage(
        passage_id=f"p{place}", document_id=f"d{place // 2}.md", title=f"T{place}", text="a b c", score=1 / (place + 1)
    )
    for place in range(6)
]
PASSAGES[0].metadata.update({"year": 1999, "nested": {"not": "scalar"}})


@functools.cache
def splitter() -> PassageSplitter:
    return PassageSplitter(TEST_TEMPLATE, make_tiny_tokenizer(), 64)


@dataclass
class StandIn:
    """In the place of ``blockrag.http.door.RemoteGateway``."""

    settings: Settings = field(default_factory=Settings)
    searcher: FakeSearcher = field(default_factory=lambda: FakeSearcher(PASSAGES))
    planner: FakePlanner = field(default_factory=FakePlanner)
    decoder: FakeDecoder = field(default_factory=FakeDecoder)
    index: FakeIndex = field(default_factory=FakeIndex)
    error: BlockragError | None = None
    """Raised by what is asked next."""
    calls: list[OnBehalf] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._answering = Answering(self.searcher, self.planner, self.decoder, "f00d", "tiny")
        cache = FakeCache()
        self._corpus = Corpus(self.index, preparing(splitter()), 8, Leftovers(self.index, cache, 3600.0))

    def _note(self, call: OnBehalf) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def generate(
        self, request: rag_pb2.GenerateRequest, call: OnBehalf
    ) -> AsyncGenerator[rag_pb2.GenerateResponse, None]:
        self._note(call)
        context = request_context(call, call.caller.tenant)
        timings = Timings(received=time.perf_counter())
        with observed("RagService", "Generate", context) as current:
            question = validation.check_generate(request, self.settings.gateway, ABILITY)
            if question.collection == "nowhere":
                raise NotFoundError("there is no collection 'nowhere'")
            deadline = Deadline(question.timeout_ms)
            async with aclosing(self._answering.answer(question, current, timings, deadline)) as events:
                async for event in events:
                    yield event

    async def retrieve(self, request: rag_pb2.RetrieveRequest, call: OnBehalf) -> rag_pb2.RetrieveResponse:
        self._note(call)
        with observed("RagService", "Retrieve", request_context(call, call.caller.tenant)) as current:
            search = validation.check_retrieve(request, self.settings.gateway)
            return await self._answering.retrieve(search, current, Deadline(1000))

    async def ingest(
        self, header: corpus_pb2.DocumentHeader, pieces: AsyncIterator[bytes], authorization: str
    ) -> corpus_pb2.IngestDocumentResponse:
        self.authorizations.append(authorization)
        checked = validation.check_header(header)
        with tempfile.TemporaryFile() as spool:
            async for piece in pieces:
                spool.write(piece)
            spool.seek(0)
            return await self._corpus.ingest(checked, spool, request_context(None, "public"))

    async def list_documents(
        self, request: corpus_pb2.ListDocumentsRequest, call: OnBehalf
    ) -> corpus_pb2.ListDocumentsResponse:
        self._note(call)
        return await self._corpus.list_documents(
            validation.check_collection(request.collection),
            validation.check_page_size(request.page_size),
            request.page_token,
            request_context(call, call.caller.tenant),
            validation.check_document_ids(request.document_ids, validation.MAX_PAGE),
        )

    async def list_collections(self, request: None, call: OnBehalf) -> corpus_pb2.ListCollectionsResponse:
        self._note(call)
        return await self._corpus.list_collections(request_context(call, call.caller.tenant))

    async def delete_document(
        self, request: corpus_pb2.DeleteDocumentRequest, call: OnBehalf
    ) -> corpus_pb2.DeleteDocumentResponse:
        self._note(call)
        if (request.collection, request.document_id) not in self.index.documents:
            raise NotFoundError(f"there is no document {request.document_id!r}")
        return await self._corpus.delete_document(
            request.collection, request.document_id, request_context(call, call.caller.tenant)
        )

    async def warm(
        self, request: corpus_pb2.WarmRequest, call: OnBehalf
    ) -> AsyncGenerator[corpus_pb2.WarmResponse, None]:
        self._note(call)
        for done in range(4):
            yield corpus_pb2.WarmResponse(done=done, total=3, hits=min(done, 1), encoded_bytes=done * 100)

    async def describe(self, request: None, call: OnBehalf) -> system_pb2.DescribeResponse:
        self._note(call)
        state: dict[str, Callable[[], Awaitable[Message]]] = {"retriever": _well, "decoder": _ill}
        return await Describing(state, self.settings.gateway, "f00d", 512, ABILITY, quotas=lambda stored: []).describe(
            call.caller
        )

    async def trace(self, request: system_pb2.GetTraceRequest, call: OnBehalf) -> system_pb2.GetTraceResponse:
        self._note(call)
        validation.check_trace_id(request.trace_id)
        began = 1_700_000_000_123_456_789
        return system_pb2.GetTraceResponse(
            spans=[
                system_pb2.TraceSpan(
                    span_id="a", name="Generate", service="gateway", start_unix_ns=began, end_unix_ns=began + 9_000_000
                ),
                system_pb2.TraceSpan(
                    span_id="b",
                    parent_span_id="a",
                    name="search",
                    service="retriever",
                    start_unix_ns=began + 1_500_000,
                    end_unix_ns=began + 4_000_000,
                    error="late",
                ),
            ]
        )


async def _well() -> Message:
    return retriever_pb2.GetRetrieverStatusResponse()


async def _ill() -> Message:
    raise ConnectionError("gone")


@asynccontextmanager
async def served(gateway: StandIn, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The application behind a real HTTP server, and a client of it."""
    config = uvicorn.Config(build_app(gateway, settings), port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:  # noqa: ASYNC110  (uvicorn has no event to wait for)
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        await serving
