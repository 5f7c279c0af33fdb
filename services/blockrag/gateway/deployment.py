"""The gateway as a Serve application: the public API."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from typing import Any, TypeAlias

from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from ray.serve.handle import DeploymentHandle

from blockrag import handles
from blockrag.access import Access, Caller
from blockrag.alike import alike
from blockrag.compressor.compression_request import CompressionAbility
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageDrafts, PassageTokenizer
from blockrag.configured import configured_bundle
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.errors import InvalidRequestError, NotFoundError
from blockrag.gateway import validation
from blockrag.gateway.admission import Quotas
from blockrag.gateway.answering import Answering, Deadline, Timings
from blockrag.gateway.corpus import Corpus, receive_content, receive_header, refused_gently, while_it_moves
from blockrag.gateway.describing import Describing
from blockrag.gateway.leftovers import Leftovers
from blockrag.gateway.observing import count_answer, observed, request_context
from blockrag.gateway.planning import NearPlanner
from blockrag.gateway.warming import ALL_FORMS, AnsweredTurns, Warming
from blockrag.grpc_status import rpc
from blockrag.ingest.parser_pool import ParserPool
from blockrag.ingest.splitting import PassageSplitter
from blockrag.limits import HEALTH_CHECKS
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import metrics, read_trace, setup_telemetry, trace_directory
from blockrag.v1 import corpus_pb2, rag_pb2, system_pb2

_REMEMBERED_PASSAGES = 16_384
"""Passages whose token ids a replica keeps: about 2 KB each."""

GrpcContext: TypeAlias = RayServegRPCContext | None


class Gateway:
    """Serves ``RagService``, ``CorpusService`` and ``SystemService`` of ``blockrag.v1``."""

    def __init__(self, settings: Settings) -> None:
        setup_telemetry("gateway", settings)
        self.access = Access(settings)
        limits = settings.gateway
        bundle = configured_bundle(settings)
        tokenizer = bundle.load_fast_tokenizer()
        splitter = PassageSplitter(bundle.template, tokenizer, settings.ingest.passage_tokens)
        parsers = ParserPool(settings.ingest.parsers, settings.ingest.parse_timeout_s, settings.ingest.parse_memory_mb)
        retriever = handles.RetrieverClient(serve.get_app_handle)
        compressor = handles.CompressorClient(serve.get_app_handle)
        kv_cache = handles.KvCacheClient(serve.get_app_handle)
        decoder = handles.DecoderClient(_find_decoders)
        self._limits = limits
        self._ability = CompressionAbility.of(bundle)
        validation.check_default_rate(limits, self._ability)
        self._trace_directory = trace_directory(settings)
        self._quotas = Quotas(limits, self.access.limits)
        passages = PassageTokenizer(tokenizer, bundle.template, _REMEMBERED_PASSAGES)
        drafts = PassageDrafts(detokenizer_factory(tokenizer, ""), bundle.chunk_tokens)
        planner = Planner(passages, bundle.max_context_tokens, self._ability, drafts)
        self._answering = Answering(
            retriever,
            NearPlanner(planner, compressor),
            decoder,
            bundle.fingerprint,
            bundle.name,
            record_text=settings.telemetry.record_text,
            best_last=limits.best_passage == "last",
        )
        self._corpus = Corpus(
            retriever,
            functools.partial(parsers.prepare, splitter=splitter),
            settings.ingest.batch_passages,
            Leftovers(retriever, kv_cache, limits.max_timeout_ms / 1000),
        )
        self._warming = Warming(
            retriever,
            compressor,
            kv_cache,
            ALL_FORMS if bundle.refrag is not None else (),
            int(settings.kv_cache.budget_mb * 2**20 * settings.kv_cache.tenant_share),
        )
        self._turns = AnsweredTurns(limits.encode_turns, passages.turn_ids, kv_cache)
        self._describing = Describing(
            {
                "retriever": retriever.status,
                "encoder": handles.EncoderClient(serve.get_app_handle).status,
                "kv_cache": kv_cache.status,
                "compressor": compressor.tokenize_passages,
                "decoder": decoder.status,
                "http": handles.HttpClient(serve.get_app_handle).answer,
            },
            limits=limits,
            bundle_fingerprint=bundle.fingerprint,
            max_positions=bundle.max_context_tokens,
            ability=self._ability,
            quotas=lambda stored: self._quotas.rows(self.access.names(), stored),
        )

    @rpc
    async def Generate(
        self, request: rag_pb2.GenerateRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> AsyncIterator[rag_pb2.GenerateResponse]:
        """Answers a question."""
        timings = Timings(received=time.perf_counter())
        context = request_context(grpc_context, caller.tenant)
        with observed("RagService", "Generate", context) as current:
            question = validation.check_generate(request, self._limits, self._ability)
            deadline = Deadline(question.timeout_ms)
            with self._quotas.answer(caller.tenant) as metered:
                metrics.NUM_REQUESTS_RUNNING.set(self._quotas.answers.running, service="gateway")
                try:
                    async with aclosing(self._answering.answer(question, current, timings, deadline)) as events:
                        async for event in events:
                            metered.see(event)
                            if event.HasField("completion"):
                                count_answer(event.completion)
                                self._turns.encode(question, event.completion.answer, context)
                            yield event
                finally:
                    metered.end(timings.prompt_tokens)
                    metrics.NUM_REQUESTS_RUNNING.set(self._quotas.answers.running - 1, service="gateway")

    @rpc
    async def Retrieve(
        self, request: rag_pb2.RetrieveRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> rag_pb2.RetrieveResponse:
        """Searches without answering."""
        context = request_context(grpc_context, caller.tenant)
        with observed("RagService", "Retrieve", context) as current, self._quotas.question(caller.tenant):
            search = validation.check_retrieve(request, self._limits)
            deadline = Deadline(self._limits.max_timeout_ms)
            return await self._answering.retrieve(search, current, deadline)

    @rpc
    async def IngestDocument(
        self,
        request: gRPCInputStream[corpus_pb2.IngestDocumentRequest],
        grpc_context: GrpcContext = None,
        *,
        caller: Caller,
    ) -> corpus_pb2.IngestDocumentResponse:
        """Stores a document, or those of a jsonl file."""
        context = request_context(grpc_context, caller.tenant)
        max_bytes = self._limits.max_document_mb * 2**20
        with observed("CorpusService", "IngestDocument", context) as current:
            async with refused_gently(request, max_bytes):
                with self._quotas.ingests.slot(caller.tenant):
                    messages = while_it_moves(request, self._limits.upload_idle_s)
                    header = validation.check_header(await receive_header(messages))
                    with closing(await receive_content(messages, max_bytes)) as spool:
                        if request.is_cancelled():
                            # Serve ends the stream of a client that went away as if it were complete.
                            raise asyncio.CancelledError
                        return await self._corpus.ingest(header, spool, current.child_context())

    @rpc
    async def DeleteDocument(
        self, request: corpus_pb2.DeleteDocumentRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> corpus_pb2.DeleteDocumentResponse:
        """Removes a document, its passages and their KV."""
        with observed("CorpusService", "DeleteDocument", request_context(grpc_context, caller.tenant)) as current:
            collection = validation.check_collection(request.collection)
            document_id = validation.read_document_id(request.document_id)
            return await self._corpus.delete_document(collection, document_id, current.child_context())

    @rpc
    async def DeleteSource(
        self, request: corpus_pb2.DeleteSourceRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> corpus_pb2.DeleteSourceResponse:
        """Removes the documents that came from one source."""
        with observed("CorpusService", "DeleteSource", request_context(grpc_context, caller.tenant)) as current:
            collection = validation.check_collection(request.collection)
            source = validation.check_source(request.source)
            return await self._corpus.delete_source(collection, source, current.child_context())

    @rpc
    async def ListDocuments(
        self, request: corpus_pb2.ListDocumentsRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> corpus_pb2.ListDocumentsResponse:
        """Pages through a collection."""
        with observed("CorpusService", "ListDocuments", request_context(grpc_context, caller.tenant)) as current:
            collection = validation.check_collection(request.collection)
            page_size = validation.check_page_size(request.page_size)
            document_ids = validation.check_document_ids(request.document_ids, validation.MAX_PAGE)
            return await self._corpus.list_documents(
                collection, page_size, request.page_token, current.child_context(), document_ids
            )

    @rpc
    async def ListCollections(
        self, request: corpus_pb2.ListCollectionsRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> corpus_pb2.ListCollectionsResponse:
        """Names the tenant's collections."""
        with observed("CorpusService", "ListCollections", request_context(grpc_context, caller.tenant)) as current:
            return await self._corpus.list_collections(current.child_context())

    @rpc
    async def DeleteCollection(
        self, request: corpus_pb2.DeleteCollectionRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> corpus_pb2.DeleteCollectionResponse:
        """Removes a collection with everything in it."""
        with observed("CorpusService", "DeleteCollection", request_context(grpc_context, caller.tenant)) as current:
            if not request.collection:
                raise InvalidRequestError("collection", "must be named to be deleted")
            collection = validation.check_collection(request.collection)
            return await self._corpus.delete_collection(collection, current.child_context())

    @rpc
    async def Warm(
        self, request: corpus_pb2.WarmRequest, grpc_context: GrpcContext = None, *, caller: Caller
    ) -> AsyncIterator[corpus_pb2.WarmResponse]:
        """Encodes passages ahead of time and reports progress."""
        with observed("CorpusService", "Warm", request_context(grpc_context, caller.tenant)) as current:
            collection = validation.check_collection(request.collection)
            document_ids = validation.check_document_ids(request.document_ids)
            progress = self._warming.warm(collection, document_ids, request.pin, current.child_context())
            with self._quotas.warmings.slot(caller.tenant):
                async with aclosing(progress) as steps:
                    async for step in steps:
                        yield step

    @rpc
    async def Describe(self, request: system_pb2.DescribeRequest, *, caller: Caller) -> system_pb2.DescribeResponse:
        """Reports the bundle, the limits and every service's state."""
        return await self._describing.describe(caller)

    @rpc
    async def GetTrace(self, request: system_pb2.GetTraceRequest, *, caller: Caller) -> system_pb2.GetTraceResponse:
        """The spans of one of the tenant's requests, as far as this node keeps them."""
        trace_id = validation.check_trace_id(request.trace_id)
        # What nobody is named for may be another's.
        tenant = None if caller.operator else caller.tenant
        spans = await asyncio.to_thread(read_trace, self._trace_directory, trace_id, tenant)
        if not spans:
            raise NotFoundError(f"no spans of trace {trace_id}: not kept here, not sampled, or not written yet")
        return system_pb2.GetTraceResponse(spans=[alike(system_pb2.TraceSpan, stored) for stored in spans])


def _find_decoders(application: str) -> DeploymentHandle[Any]:
    """The decoders themselves, not the door that there may be before several of them."""
    serve.get_app_handle(application)  # raises when it is not deployed
    return serve.get_deployment_handle("Decoder", application)


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    # Above what is admitted: one request too many must reach the admission to be refused, not wait in a queue.
    ongoing = settings.gateway.max_inflight * 2 + 64
    return serve.deployment(
        num_replicas=settings.gateway.replicas,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        **HEALTH_CHECKS,
        ray_actor_options={"num_cpus": 0.1},
    )(Gateway).bind(settings)
