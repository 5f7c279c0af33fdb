"""Documents in and out: ingest, delete, list.

The retriever makes a document visible in one step (stage passages, then commit), so an ingest that is interrupted
leaves nothing visible and is completed by running it again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from blockrag.errors import InvalidRequestError, NotFoundError
from blockrag.ingest.pipeline import PreparedDocument, SourceDocument
from blockrag.v1 import corpus_pb2, kv_cache_pb2, retriever_pb2
from blockrag.v1.common_pb2 import Passage, RequestContext
from blockrag.v1.corpus_pb2 import IngestedDocument

Prepare = Callable[[BinaryIO, SourceDocument], AbstractAsyncContextManager[Iterator[PreparedDocument]]]
"""Parses a received file; splitting it, while the documents are consumed, blocks."""


class DocumentIndex(Protocol):
    """The part of the retriever that keeps documents."""

    async def scan_documents(
        self, request: retriever_pb2.ScanDocumentsRequest
    ) -> retriever_pb2.ScanDocumentsResponse: ...

    async def scan_collections(
        self, request: retriever_pb2.ScanCollectionsRequest
    ) -> retriever_pb2.ScanCollectionsResponse: ...

    async def add_passages(self, request: retriever_pb2.AddPassagesRequest) -> retriever_pb2.AddPassagesResponse: ...

    async def commit_document(
        self, request: retriever_pb2.CommitDocumentRequest
    ) -> retriever_pb2.CommitDocumentResponse: ...

    async def remove_document(
        self, request: retriever_pb2.RemoveDocumentRequest
    ) -> retriever_pb2.RemoveDocumentResponse: ...

    async def remove_collection(
        self, request: retriever_pb2.RemoveCollectionRequest
    ) -> retriever_pb2.RemoveCollectionResponse: ...


class Purger(Protocol):
    """The part of the KV cache that forgets."""

    async def purge_documents(
        self, request: kv_cache_pb2.PurgeDocumentsRequest
    ) -> kv_cache_pb2.PurgeDocumentsResponse: ...


@dataclass(frozen=True)
class Corpus:
    """Keeps a tenant's documents by means of the services it is given."""

    index: DocumentIndex
    cache: Purger
    prepare: Prepare
    batch_passages: int

    async def ingest(
        self, header: corpus_pb2.DocumentHeader, spool: BinaryIO, context: RequestContext
    ) -> corpus_pb2.IngestDocumentResponse:
        """Stores the documents of one received file; raises ``InvalidRequestError`` for what cannot be read.

        ``header`` is checked already. Of a jsonl file, documents before one that fails stay stored.
        """
        source = SourceDocument(
            document_id=header.document_id,
            title=header.title,
            media_type=header.media_type,
            metadata=MessageToDict(header.metadata),
        )
        response = corpus_pb2.IngestDocumentResponse()
        async with self.prepare(spool, source) as prepared:
            while (document := await asyncio.to_thread(next, prepared, None)) is not None:
                response.documents.append(await self._store(header.collection, document, context))
        return response

    async def delete_document(
        self, collection: str, document_id: str, context: RequestContext
    ) -> corpus_pb2.DeleteDocumentResponse:
        """Removes a document and its KV; ``NotFoundError`` when there is none."""
        purged = await self._purge(collection, document_id, context)
        removed = await self.index.remove_document(
            retriever_pb2.RemoveDocumentRequest(context=context, collection=collection, document_id=document_id)
        )
        purged += await self._purge(collection, document_id, context)
        return corpus_pb2.DeleteDocumentResponse(passages=removed.passages, purged_blocks=purged)

    async def delete_collection(self, collection: str, context: RequestContext) -> corpus_pb2.DeleteCollectionResponse:
        """Removes a collection and its KV; ``NotFoundError`` when there is none."""
        purged = await self._purge(collection, "", context)
        removed = await self.index.remove_collection(
            retriever_pb2.RemoveCollectionRequest(context=context, collection=collection)
        )
        purged += await self._purge(collection, "", context)
        return corpus_pb2.DeleteCollectionResponse(
            documents=removed.documents, passages=removed.passages, purged_blocks=purged
        )

    async def list_documents(
        self, collection: str, page_size: int, page_token: str, context: RequestContext
    ) -> corpus_pb2.ListDocumentsResponse:
        """One page, ordered by id."""
        found = await self.index.scan_documents(
            retriever_pb2.ScanDocumentsRequest(
                context=context,
                collection=collection,
                after_document_id=_read_page_token(page_token, collection),
                limit=page_size + 1,
            )
        )
        page = found.documents[:page_size]
        more = len(found.documents) > page_size
        return corpus_pb2.ListDocumentsResponse(
            documents=[
                corpus_pb2.DocumentSummary(
                    document_id=document.document_id,
                    version=document.version,
                    title=document.title,
                    passages=document.passages,
                    metadata=document.metadata,
                )
                for document in page
            ],
            next_page_token=_page_token(collection, page[-1].document_id) if more else "",
            total=found.total_documents,
        )

    async def list_collections(self, context: RequestContext) -> corpus_pb2.ListCollectionsResponse:
        """All of the tenant's collections, by name."""
        found = await self.index.scan_collections(retriever_pb2.ScanCollectionsRequest(context=context))
        return corpus_pb2.ListCollectionsResponse(
            collections=[
                corpus_pb2.CollectionSummary(name=item.name, documents=item.documents, passages=item.passages)
                for item in found.collections
            ]
        )

    async def _store(self, collection: str, document: PreparedDocument, context: RequestContext) -> IngestedDocument:
        stored = await self._stored(collection, document.document_id, context)
        if stored is not None and stored.version == document.version:
            return IngestedDocument(
                document_id=document.document_id,
                version=document.version,
                passages=stored.passages,
                outcome=corpus_pb2.INGEST_OUTCOME_UNCHANGED,
            )
        metadata = Struct()
        metadata.update(document.metadata)
        count = await self._stage(collection, document, metadata, context)
        if not count:
            raise InvalidRequestError("content", f"document {document.document_id!r} has no text")
        if stored is not None:
            # Before as well as after: when the cache cannot be reached, nothing has changed yet and a second try
            # finds it so; what a question encodes again between the two is purged by the other.
            await self._purge(collection, document.document_id, context)
        committed = await self.index.commit_document(
            retriever_pb2.CommitDocumentRequest(
                context=context,
                collection=collection,
                document_id=document.document_id,
                version=document.version,
                title=document.title,
                metadata=metadata,
                passages=count,
            )
        )
        replaced = bool(committed.replaced_version)
        if replaced:
            await self._purge(collection, document.document_id, context)
        return IngestedDocument(
            document_id=document.document_id,
            version=document.version,
            passages=count,
            outcome=corpus_pb2.INGEST_OUTCOME_REPLACED if replaced else corpus_pb2.INGEST_OUTCOME_CREATED,
        )

    async def _stage(
        self, collection: str, document: PreparedDocument, metadata: Struct, context: RequestContext
    ) -> int:
        count = 0
        while texts := await asyncio.to_thread(_take, document.passages, self.batch_passages):
            passages = [
                Passage(
                    document_id=document.document_id,
                    document_version=document.version,
                    ordinal=count + place,
                    title=document.passage_title,
                    text=text,
                    metadata=metadata,
                )
                for place, text in enumerate(texts)
            ]
            await self.index.add_passages(
                retriever_pb2.AddPassagesRequest(context=context, collection=collection, passages=passages)
            )
            count += len(passages)
        return count

    async def _stored(
        self, collection: str, document_id: str, context: RequestContext
    ) -> retriever_pb2.StoredDocument | None:
        request = retriever_pb2.ScanDocumentsRequest(
            context=context, collection=collection, document_ids=[document_id], limit=1
        )
        try:
            found = await self.index.scan_documents(request)
        except NotFoundError:  # the first document of a collection makes it
            return None
        return found.documents[0] if found.documents else None

    async def _purge(self, collection: str, document_id: str, context: RequestContext) -> int:
        document = kv_cache_pb2.DocumentRef(collection=collection, document_id=document_id)
        purged = await self.cache.purge_documents(
            kv_cache_pb2.PurgeDocumentsRequest(context=context, documents=[document])
        )
        return purged.blocks


def _take(texts: Iterator[str], most: int) -> list[str]:
    return list(itertools.islice(texts, most))


def _page_token(collection: str, document_id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([collection, document_id]).encode()).decode()


def _read_page_token(token: str, collection: str) -> str:
    if not token:
        return ""
    try:
        of_collection, document_id = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError):
        raise InvalidRequestError("page_token", "is none that this server gave") from None
    if of_collection != collection or not isinstance(document_id, str):
        raise InvalidRequestError("page_token", "belongs to another collection")
    return document_id
