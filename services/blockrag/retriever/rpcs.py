"""The retriever's work, free of Ray: messages in, messages out; which index and model the settings choose;
and what a tenant may store, checked where documents become visible, so whoever writes meets it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from blockrag.access import Caller, show_own
from blockrag.alike import alike
from blockrag.bm25 import bm25_of
from blockrag.errors import InvalidRequestError, NotFoundError, OverloadedError, SettingsError, UnavailableError
from blockrag.fairness import Turns
from blockrag.grpc_status import rpc
from blockrag.identity import CollectionId, check_normalised
from blockrag.languages import LANGUAGES
from blockrag.limits import MIB
from blockrag.metadata import struct_of
from blockrag.retriever import passage_messages as messages
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.embedding import Embedder, embedded, find_embedding
from blockrag.retriever.payload import Condition, parse_conditions
from blockrag.retriever.vector_index import (
    EmbeddingInfo,
    FoundPassage,
    SearchQuery,
    VectorIndex,
    other_language,
)
from blockrag.settings import RetrieverSettings, Settings
from blockrag.telemetry import span
from blockrag.tenants import LimitsOf, TenantLimits, no_limits
from blockrag.v1 import retriever_pb2

_RETRY_MS = 60_000
"""When to come back after a refusal that passes only when something is removed."""


class StorageQuotas:
    """Counts what tenants store. Exact within a replica; with several, each may let one document more through."""

    def __init__(self, index: VectorIndex, limits_of: LimitsOf) -> None:
        self._index = index
        self._limits_of = limits_of
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def storing(self, collection: CollectionId, document_id: str) -> AsyncIterator[None]:
        """Within it a document may be stored: nobody else of the tenant stores meanwhile, where that must be counted.

        Raises ``OverloadedError`` naming the limit that is reached.
        """
        limits = self._limits_of(collection.tenant)
        if limits.collections is None and limits.documents is None and limits.index_mb is None:
            yield
            return
        async with self._locks.setdefault(collection.tenant, asyncio.Lock()):
            await self._check(limits, collection, document_id)
            yield

    async def check(self, collection: CollectionId, document_id: str) -> None:
        """Raises what ``storing`` would raise now: for who is about to compute what it could not store."""
        async with self.storing(collection, document_id):
            pass

    async def _check(self, limits: TenantLimits, collection: CollectionId, document_id: str) -> None:
        owned = await self._index.collections(collection.tenant)
        if limits.collections is not None and collection not in owned and len(owned) >= limits.collections:
            raise _reached(f"{len(owned)} collections of {limits.collections}")
        if limits.documents is not None and not await self._has(collection, document_id):
            documents = sum([(await self._index.counts(one)).documents for one in owned])
            if documents >= limits.documents:
                raise _reached(f"{documents} documents of {limits.documents}")
        if limits.index_mb is not None:
            used = sum([await self._index.disk_bytes(one) for one in owned])
            if used >= limits.index_mb * MIB:
                raise _reached(f"{used / MIB:.1f} MiB of the index's {limits.index_mb}")

    async def _has(self, collection: CollectionId, document_id: str) -> bool:
        try:
            return bool(await self._index.find_documents(collection, [document_id]))
        except NotFoundError:
            return False


def _reached(what: str) -> OverloadedError:
    return OverloadedError(f"this tenant has {what} that it may have; remove some, or have the limit raised", _RETRY_MS)


_logger = logging.getLogger(__name__)

MOST_PASSAGES = 1000
"""A larger ``top_k`` is served with this many candidates."""
SWEEP_PERIOD_S = 3600.0
"""How often what was staged and never committed is looked for."""
_SEARCHES = 2
"""Searches at a time: one embeds while another one is in the index."""
_PAGE = 1000
_DEFAULT_PAGE = 100
_SCANNED_DOCUMENTS = 64

P = ParamSpec("P")
T = TypeVar("T")


class RetrieverService:
    """Embeds, indexes, searches: the RPCs of ``blockrag.v1.RetrieverService``."""

    def __init__(
        self,
        index: VectorIndex,
        embedder: Embedder,
        settings: RetrieverSettings,
        limits_of: LimitsOf = no_limits,
    ) -> None:
        """``limits_of``: what a tenant may store."""
        self._index = index
        self._quotas = StorageQuotas(index, limits_of)
        self._embedder = embedder
        self._settings = settings
        # Embedder and index answer one after another: more at a time would wait in them, whoever they are of.
        self._turns = Turns(_SEARCHES)
        # A question never waits for the passages of an ingest.
        self._query_thread = ThreadPoolExecutor(1, thread_name_prefix="embed-query")
        self._passage_thread = ThreadPoolExecutor(1, thread_name_prefix="embed-passages")
        self._sweeping: asyncio.Task[None] | None = None

    @rpc
    async def Search(self, request: retriever_pb2.SearchRequest) -> retriever_pb2.SearchResponse:
        """Raises ``InvalidRequestError``, ``NotFoundError``, ``UnavailableError``."""
        collection = messages.collection_of(request.context, request.collection)
        conditions = parse_conditions(request.filter)
        if not request.query.strip():
            raise InvalidRequestError("query", "must not be empty")
        check_normalised("query", request.query)
        if not request.top_k:
            raise InvalidRequestError("top_k", "must be at least 1")
        async with self._turns.turn(collection.tenant):
            found, language = await self._search(request, collection, conditions)
        passages = [messages.passage_message(one.passage, one.score, one.also_in) for one in found]
        return retriever_pb2.SearchResponse(passages=passages, language=language)

    async def _search(
        self, request: retriever_pb2.SearchRequest, collection: CollectionId, conditions: tuple[Condition, ...]
    ) -> tuple[list[FoundPassage], str]:
        """What is found, and the collection's language."""
        with span("embed", request.context):
            vector, language = await asyncio.gather(
                _in(self._query_thread, self._embedder.embed_query, request.query), self._index.language(collection)
            )
        limit = min(request.top_k, MOST_PASSAGES)
        query = SearchQuery(
            dense=vector,
            sparse=bm25_of(language).embed_query(request.query),
            limit=limit,
            candidates=max(self._settings.candidates, limit),
            rrf_k=self._settings.rrf_k,
            conditions=conditions,
        )
        with span("search", request.context, collection=collection.name, top_k=request.top_k) as current:
            found = await self._index.search(collection, query)
            current.set(passages=len(found))
        return found, language

    @rpc
    async def AddPassages(self, request: retriever_pb2.AddPassagesRequest) -> retriever_pb2.AddPassagesResponse:
        """Raises ``InvalidRequestError``, ``UnavailableError``, ``OverloadedError`` for one too many of the tenant."""
        collection = messages.collection_of(request.context, request.collection)
        passages = messages.staged_passages(collection, request)
        await self._quotas.check(collection, passages[0].document_id)
        language = await self._language(collection, request.language)
        with span("embed_passages", request.context, passages=len(passages)):
            bm25 = bm25_of(language)
            points = await _in(self._passage_thread, embedded, self._embedder, bm25, passages)
        with span("stage", request.context, collection=collection.name):
            async with self._quotas.storing(collection, passages[0].document_id):
                await self._index.stage(collection, points, language)
        return retriever_pb2.AddPassagesResponse(added=len(points))

    @rpc
    async def CommitDocument(
        self, request: retriever_pb2.CommitDocumentRequest
    ) -> retriever_pb2.CommitDocumentResponse:
        """Raises ``InvalidRequestError`` when passages are missing, ``OverloadedError`` as ``AddPassages`` does,
        ``UnavailableError``."""
        collection = messages.collection_of(request.context, request.collection)
        document = messages.committed_document(request)
        with span("commit", request.context, collection=collection.name, passages=document.passages):
            async with self._quotas.storing(collection, document.document_id):
                replaced = await self._index.commit(collection, document)
        return retriever_pb2.CommitDocumentResponse(replaced_version=replaced)

    @rpc
    async def RemoveDocument(
        self, request: retriever_pb2.RemoveDocumentRequest
    ) -> retriever_pb2.RemoveDocumentResponse:
        """Raises ``NotFoundError``, ``UnavailableError``."""
        collection = messages.collection_of(request.context, request.collection)
        passages = await self._index.remove_document(collection, request.document_id)
        return retriever_pb2.RemoveDocumentResponse(passages=passages)

    @rpc
    async def RemoveCollection(
        self, request: retriever_pb2.RemoveCollectionRequest
    ) -> retriever_pb2.RemoveCollectionResponse:
        """Raises ``NotFoundError``, ``UnavailableError``."""
        if not request.collection:
            raise InvalidRequestError("collection", "must not be empty")
        collection = messages.collection_of(request.context, request.collection)
        counts = await self._index.remove_collection(collection)
        return alike(retriever_pb2.RemoveCollectionResponse, counts)

    @rpc
    async def ScanDocuments(self, request: retriever_pb2.ScanDocumentsRequest) -> retriever_pb2.ScanDocumentsResponse:
        """Raises ``NotFoundError``, ``UnavailableError``."""
        collection = messages.collection_of(request.context, request.collection)
        if request.document_ids:
            if len(request.document_ids) > _PAGE:
                raise InvalidRequestError("document_ids", f"must be at most {_PAGE}")
            documents = await self._index.find_documents(collection, list(request.document_ids))
        else:
            limit = min(request.limit or _DEFAULT_PAGE, _PAGE)
            documents = await self._index.documents(collection, request.after_document_id, limit)
        counts = await self._index.counts(collection)
        return retriever_pb2.ScanDocumentsResponse(
            documents=[alike(retriever_pb2.StoredDocument, one, metadata=struct_of(one.metadata)) for one in documents],
            total_documents=counts.documents,
        )

    @rpc
    async def ScanPassages(self, request: retriever_pb2.ScanPassagesRequest) -> retriever_pb2.ScanPassagesResponse:
        """Raises ``NotFoundError`` for the collection, ``UnavailableError``; documents that are gone are left out."""
        collection = messages.collection_of(request.context, request.collection)
        if not 1 <= len(request.document_ids) <= _SCANNED_DOCUMENTS:
            raise InvalidRequestError("document_ids", f"must be 1 to {_SCANNED_DOCUMENTS}")
        passages = await self._index.passages(collection, list(request.document_ids))
        bare = (replace(passage, metadata={}) for passage in passages)  # it would be told for each of them
        return retriever_pb2.ScanPassagesResponse(passages=map(messages.passage_message, bare))

    @rpc
    async def ScanCollections(
        self, request: retriever_pb2.ScanCollectionsRequest
    ) -> retriever_pb2.ScanCollectionsResponse:
        """Raises ``UnavailableError``."""
        response = retriever_pb2.ScanCollectionsResponse()
        for collection in await self._index.collections(messages.tenant_of(request.context)):
            counts = await self._index.counts(collection)
            response.collections.add(
                name=collection.name,
                documents=counts.documents,
                passages=counts.passages,
                language=await self._index.language(collection),
            )
        return response

    @rpc
    async def GetRetrieverStatus(
        self, request: retriever_pb2.GetRetrieverStatusRequest, *, caller: Caller
    ) -> retriever_pb2.GetRetrieverStatusResponse:
        """As far as the caller may see. Raises ``UnavailableError``."""
        tenants: dict[str, retriever_pb2.TenantStored] = {}
        for collection in await self._index.collections(None):
            row = tenants.setdefault(collection.tenant, retriever_pb2.TenantStored(tenant=collection.tenant))
            counts = await self._index.counts(collection)
            row.collections += 1
            row.documents += counts.documents
            row.passages += counts.passages
            row.bytes += await self._index.disk_bytes(collection)
        status = retriever_pb2.GetRetrieverStatusResponse(
            backend=self._settings.backend,
            embedding_model=self._embedder.files.name,
            dimensions=self._embedder.files.dimensions,
            collections=sum(row.collections for row in tenants.values()),
            passages=sum(row.passages for row in tenants.values()),
            tenants=[tenants[name] for name in sorted(tenants)],
        )
        return show_own(status, caller)

    async def start(self) -> None:
        """Opens the index ahead of the first question and begins to sweep it. A store that is down now may be up later.

        Raises ``SettingsError`` for an index that was made with another embedding model.
        """
        try:
            await self._index.collections(None)
        except UnavailableError as error:
            _logger.warning("the vector index is not available yet: %s", error)
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    async def _sweep(self) -> None:
        """Now and each hour: what was staged for a day belongs to an upload that broke off."""
        while True:
            try:
                await self._index.sweep()
            except UnavailableError as error:
                _logger.warning("the vector index is not available, it is swept later: %s", error)
            except Exception:
                _logger.exception("sweeping the index failed; it is tried again")
            await asyncio.sleep(SWEEP_PERIOD_S)

    async def _language(self, collection: CollectionId, wanted: str) -> str:
        """The language of passages on their way in."""
        if wanted and wanted not in LANGUAGES:
            raise InvalidRequestError("language", f"{wanted[:80]!r} is none of {', '.join(LANGUAGES)}")
        try:
            stored = await self._index.language(collection)
        except NotFoundError:
            return wanted or self._settings.language
        if wanted and wanted != stored:
            raise InvalidRequestError("language", other_language(collection, stored, wanted))
        return stored


async def _in(pool: ThreadPoolExecutor, function: Callable[P, T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def check_settings(settings: Settings) -> None:
    """Raises ``SettingsError`` for what no retriever can run with; cheap enough for ``build``."""
    retriever = settings.retriever
    if retriever.backend == "edge" and retriever.replicas > 1:
        raise SettingsError("retriever.replicas: the embedded index serves one replica; set retriever.backend: server")
    if retriever.backend == "server" and not retriever.url:
        raise SettingsError("retriever.url: must name the Qdrant server when retriever.backend is server")
    find_embedding(retriever.embedding_model)


def open_index(settings: Settings, embedding: EmbeddingInfo) -> VectorIndex:
    """The index that the settings choose; it connects or opens files when first used."""
    retriever = settings.retriever
    if retriever.backend == "server":
        from blockrag.retriever.server import ServerIndex  # its client is nothing to the embedded index

        return ServerIndex.connect(retriever.url, retriever.api_key, embedding)
    path = Path(retriever.path).expanduser() if retriever.path else settings.state_path / "index"
    return EdgeIndex(path, embedding)
