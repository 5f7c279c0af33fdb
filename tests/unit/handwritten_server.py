"""A gRPC server whose answers are written by hand, for tests of the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.struct_pb2 import Struct

from blockrag.errors import (
    BlockragError,
)
from blockrag.status import status_code
from blockrag.traceparent import trace_id_of
from blockrag.v1 import common_pb2, corpus_pb2, corpus_pb2_grpc, rag_pb2, rag_pb2_grpc, system_pb2, system_pb2_grpc

KEY = "acme-key-0123456789"


class Server(
    rag_pb2_grpc.RagServiceServicer, corpus_pb2_grpc.CorpusServiceServicer, system_pb2_grpc.SystemServiceServicer
):
    """Answers by hand; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.error: BlockragError | None = None
        self.lost: list[BlockragError | str | tuple[grpc.StatusCode, str]] = []
        """Errors of the next calls; a text is NOT_FOUND with it, as Serve says it; a pair is the status itself."""
        self.break_after: list[str] = []
        """Where the next streams break: behind ``retrieved`` or ``text``."""
        self.warm_breaks: list[int] = []
        """Passages at which the next warmings break."""
        self.warm_pause_s = 0.0
        self.uploads: list[Any] = []
        self.stopped = asyncio.Event()
        self.unhealthy = 0
        self.traces: list[list[str]] = []

    async def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.lost:
            error = self.lost.pop(0)
            if isinstance(error, tuple):
                await context.abort(*error)
            code = grpc.StatusCode.NOT_FOUND if isinstance(error, str) else status_code(error)
            await context.abort(code, str(error))
        if self.error is not None:
            await context.abort(status_code(self.error), str(self.error))

    async def Generate(self, request: rag_pb2.GenerateRequest, context: Any) -> AsyncIterator[rag_pb2.GenerateResponse]:
        await self._note(request, context)
        metadata = Struct()
        metadata.update({"year": 1999})
        found = common_pb2.Passage(passage_id="p0", document_id="d0", title="Norway", text="Oslo.", metadata=metadata)
        yield rag_pb2.GenerateResponse(request_id="r1", retrieved=rag_pb2.Retrieved(passages=[found]))
        breaks = self.break_after.pop(0) if self.break_after else ""
        if breaks == "retrieved":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a replica went away")
        if request.question == "endless":
            try:
                while True:
                    yield rag_pb2.GenerateResponse(text=rag_pb2.TextChunk(text="word ", tokens=1))
                    await asyncio.sleep(0.001)
            finally:
                self.stopped.set()
        if request.question == "slow":
            await asyncio.Event().wait()
        yield rag_pb2.GenerateResponse(request_id="r1", text=rag_pb2.TextChunk(text="Os", tokens=2))
        if breaks == "text":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a replica went away")
        if request.question == "truncated":
            return
        yield rag_pb2.GenerateResponse(request_id="r1", text=rag_pb2.TextChunk(text="lo", tokens=1))
        yield rag_pb2.GenerateResponse(
            request_id="r1",
            completion=rag_pb2.Completion(
                answer="Oslo",
                citations=[
                    rag_pb2.Citation(
                        passage_id="p0",
                        document_id="d0",
                        title="Norway",
                        tokens=9,
                        in_prompt=True,
                        chunks=[
                            common_pb2.ChunkDecision(end_token=8, form=common_pb2.CHUNK_FORM_EXPANDED),
                            common_pb2.ChunkDecision(
                                start_token=8, end_token=9, form=common_pb2.CHUNK_FORM_COMPRESSED, text=" Oslo"
                            ),
                        ],
                    )
                ],
                usage=common_pb2.Usage(
                    prompt_tokens=20,
                    cached_tokens=9,
                    l1_tokens=9,
                    completion_tokens=3,
                    context_tokens=9,
                    compressed_chunks=1,
                ),
                stages=[common_pb2.StageTime(stage="total", milliseconds=12.5)],
                finish_reason=common_pb2.FINISH_REASON_END,
                time_to_first_token_ms=3.5,
                seed=7,
                bundle_fingerprint="f00d",
                attention_mode=common_pb2.ATTENTION_MODE_FULL,
                trace_id=trace_id_of(self.metadata.get("traceparent", "")),
            ),
        )

    async def Retrieve(self, request: rag_pb2.RetrieveRequest, context: Any) -> rag_pb2.RetrieveResponse:
        await self._note(request, context)
        return rag_pb2.RetrieveResponse(passages=[common_pb2.Passage(passage_id="p0", score=0.5)])

    async def IngestDocument(
        self, request: AsyncIterator[corpus_pb2.IngestDocumentRequest], context: Any
    ) -> corpus_pb2.IngestDocumentResponse:
        messages = [message async for message in request]
        self.uploads.append(messages)
        await self._note(messages, context)
        return corpus_pb2.IngestDocumentResponse(
            documents=[
                corpus_pb2.IngestedDocument(
                    document_id=messages[0].header.document_id,
                    version="v1",
                    passages=3,
                    outcome=corpus_pb2.INGEST_OUTCOME_REPLACED,
                )
            ]
        )

    async def DeleteDocument(
        self, request: corpus_pb2.DeleteDocumentRequest, context: Any
    ) -> corpus_pb2.DeleteDocumentResponse:
        await self._note(request, context)
        return corpus_pb2.DeleteDocumentResponse(passages=3, purged_blocks=2)

    async def DeleteCollection(
        self, request: corpus_pb2.DeleteCollectionRequest, context: Any
    ) -> corpus_pb2.DeleteCollectionResponse:
        await self._note(request, context)
        return corpus_pb2.DeleteCollectionResponse(documents=1, passages=3, purged_blocks=2)

    async def DeleteSource(
        self, request: corpus_pb2.DeleteSourceRequest, context: Any
    ) -> corpus_pb2.DeleteSourceResponse:
        await self._note(request, context)
        return corpus_pb2.DeleteSourceResponse(document_ids=["r1", "r2"], passages=3, purged_blocks=2)

    async def ListDocuments(
        self, request: corpus_pb2.ListDocumentsRequest, context: Any
    ) -> corpus_pb2.ListDocumentsResponse:
        await self._note(request, context)
        start = int(request.page_token or 0)
        ids = [f"d{number}" for number in range(5)][start : start + request.page_size]
        end = start + len(ids)
        return corpus_pb2.ListDocumentsResponse(
            documents=[corpus_pb2.DocumentSummary(document_id=name) for name in ids],
            next_page_token=str(end) if end < 5 else "",
            total=5,
        )

    async def ListCollections(
        self, request: corpus_pb2.ListCollectionsRequest, context: Any
    ) -> corpus_pb2.ListCollectionsResponse:
        await self._note(request, context)
        return corpus_pb2.ListCollectionsResponse(
            collections=[corpus_pb2.CollectionSummary(name="default", documents=2, passages=9)]
        )

    async def Warm(self, request: corpus_pb2.WarmRequest, context: Any) -> AsyncIterator[corpus_pb2.WarmResponse]:
        await self._note(request, context)
        for done in (4, 9):
            if self.warm_breaks and done >= self.warm_breaks[0]:
                self.warm_breaks.pop(0)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "a replica went away")
            yield corpus_pb2.WarmResponse(done=done, total=9, hits=1)
            await asyncio.sleep(self.warm_pause_s)

    async def Describe(self, request: system_pb2.DescribeRequest, context: Any) -> system_pb2.DescribeResponse:
        await self._note(request, context)
        self.unhealthy -= 1
        healthy = self.unhealthy < 0
        response = system_pb2.DescribeResponse(
            version="1",
            services=[
                system_pb2.ServiceHealth(name="decoder", healthy=healthy, detail="" if healthy else "still starting")
            ],
        )
        response.kv_cache.tenants.add(tenant="acme", blocks=3)
        return response

    async def GetTrace(self, request: system_pb2.GetTraceRequest, context: Any) -> system_pb2.GetTraceResponse:
        names = self.traces.pop(0) if len(self.traces) > 1 else self.traces[0]
        if not names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no spans")
        return system_pb2.GetTraceResponse(
            spans=[system_pb2.TraceSpan(span_id=name, name=name, start_unix_ns=2**62) for name in names]
        )


@asynccontextmanager
async def serving(servicer: Server) -> AsyncIterator[str]:
    """``servicer`` on a free port of this machine; gives its address."""
    running = grpc.aio.server()
    rag_pb2_grpc.add_RagServiceServicer_to_server(servicer, running)
    corpus_pb2_grpc.add_CorpusServiceServicer_to_server(servicer, running)
    system_pb2_grpc.add_SystemServiceServicer_to_server(servicer, running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await running.stop(None)
