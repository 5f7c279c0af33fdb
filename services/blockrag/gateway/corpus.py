"""Documents in and out: ingest, delete, list.

The retriever makes a document visible in one step (stage passages, then commit), so an ingest that is interrupted
leaves nothing visible and is completed by running it again. A streamed document goes to a temporary file first: memory
stays small whatever its size.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, cast

from google.protobuf.struct_pb2 import Struct

from blockrag.alike import alike
from blockrag.errors import BlockragError, DeadlineError, InvalidRequestError, NotFoundError, UnavailableError
from blockrag.gateway.leftovers import Leftovers
from blockrag.grpc_status import MalformedRequest
from blockrag.handles import RetrieverClient
from blockrag.identity import page_token_after, read_page_token
from blockrag.ingest.pipeline import PreparedDocument, SourceDocument
from blockrag.metadata import metadata_of, struct_of
from blockrag.v1 import corpus_pb2, retriever_pb2
from blockrag.v1.common_pb2 import Passage, RequestContext
from blockrag.v1.corpus_pb2 import DocumentHeader, IngestDocumentRequest, IngestedDocument

_SCANNED = 1000
"""Documents of a page when all are looked at."""

Prepare = Callable[[BinaryIO, SourceDocument], AbstractAsyncContextManager[Iterator[PreparedDocument]]]
"""Parses a received file; splitting it, while the documents are consumed, blocks."""


async def all_documents(
    index: RetrieverClient, collection: str, context: RequestContext
) -> AsyncIterator[retriever_pb2.StoredDocument]:
    """A collection's documents by id, read page by page."""
    after = ""
    while True:
        request = retriever_pb2.ScanDocumentsRequest(
            context=context, collection=collection, after_document_id=after, limit=_SCANNED
        )
        page = (await index.scan_documents(request)).documents
        for document in page:
            yield document
        if len(page) < _SCANNED:
            return
        after = page[-1].document_id


@dataclass(frozen=True)
class Corpus:
    """Keeps a tenant's documents by means of the services it is given."""

    index: RetrieverClient
    prepare: Prepare
    batch_passages: int
    leftovers: Leftovers

    async def ingest(
        self, header: corpus_pb2.DocumentHeader, spool: BinaryIO, context: RequestContext
    ) -> corpus_pb2.IngestDocumentResponse:
        """Stores the documents of one received file; raises ``InvalidRequestError`` for what cannot be read.

        ``header`` is checked already; with ``dry_run`` it says what would be stored. Of a jsonl file, documents before
        one that fails stay stored. Raises ``UnavailableError`` for a document that somebody removes meanwhile.
        """
        source = alike(SourceDocument, header, metadata=metadata_of(header.metadata))
        response = corpus_pb2.IngestDocumentResponse()
        async with self.prepare(spool, source) as prepared:
            while (document := await asyncio.to_thread(next, prepared, None)) is not None:
                response.documents.append(await self._store(header, document, context))
        return response

    async def delete_document(
        self, collection: str, document_id: str, context: RequestContext
    ) -> corpus_pb2.DeleteDocumentResponse:
        """Removes a document and its KV; ``NotFoundError`` when there is none."""
        purged = await self.leftovers.purge(collection, document_id, context)
        removed = await self.index.remove_document(
            retriever_pb2.RemoveDocumentRequest(context=context, collection=collection, document_id=document_id)
        )
        purged += await self.leftovers.purge(collection, document_id, context)
        self.leftovers.deleted(collection, document_id, context)
        return corpus_pb2.DeleteDocumentResponse(passages=removed.passages, purged_blocks=purged)

    async def delete_source(
        self, collection: str, source: str, context: RequestContext
    ) -> corpus_pb2.DeleteSourceResponse:
        """Removes all documents that came from ``source``, with their KV; ``NotFoundError`` when there is none."""
        response = corpus_pb2.DeleteSourceResponse()
        async for document in all_documents(self.index, collection, context):
            if document.source != source:
                continue
            try:
                removed = await self.delete_document(collection, document.document_id, context)
            except NotFoundError:  # somebody else removed it
                continue
            response.document_ids.append(document.document_id)
            response.passages += removed.passages
            response.purged_blocks += removed.purged_blocks
        if not response.document_ids:
            raise NotFoundError(f"no document in collection {collection!r} came from {source!r}")
        return response

    async def delete_collection(self, collection: str, context: RequestContext) -> corpus_pb2.DeleteCollectionResponse:
        """Removes a collection and its KV; ``NotFoundError`` when there is none."""
        purged = await self.leftovers.purge(collection, "", context)
        removed = await self.index.remove_collection(
            retriever_pb2.RemoveCollectionRequest(context=context, collection=collection)
        )
        purged += await self.leftovers.purge(collection, "", context)
        self.leftovers.deleted(collection, "", context)
        return alike(corpus_pb2.DeleteCollectionResponse, removed, purged_blocks=purged)

    async def list_documents(
        self,
        collection: str,
        page_size: int,
        page_token: str,
        context: RequestContext,
        document_ids: Sequence[str] = (),
    ) -> corpus_pb2.ListDocumentsResponse:
        """One page, ordered by id; those of ``document_ids`` alone where they are given."""
        found = await self.index.scan_documents(
            retriever_pb2.ScanDocumentsRequest(
                context=context,
                collection=collection,
                after_document_id=read_page_token(page_token, collection),
                document_ids=document_ids,
                limit=page_size + 1,
            )
        )
        page = found.documents[:page_size]
        more = len(found.documents) > page_size
        return corpus_pb2.ListDocumentsResponse(
            documents=[alike(corpus_pb2.DocumentSummary, document) for document in page],
            next_page_token=page_token_after(collection, page[-1].document_id) if more else "",
            total=found.total_documents,
        )

    async def list_collections(self, context: RequestContext) -> corpus_pb2.ListCollectionsResponse:
        """All of the tenant's collections, by name."""
        found = await self.index.scan_collections(retriever_pb2.ScanCollectionsRequest(context=context))
        return corpus_pb2.ListCollectionsResponse(
            collections=[alike(corpus_pb2.CollectionSummary, item) for item in found.collections]
        )

    async def _store(
        self, header: corpus_pb2.DocumentHeader, document: PreparedDocument, context: RequestContext
    ) -> IngestedDocument:
        collection, source = header.collection, header.source or header.document_id
        version = _version_from(document.version, source, document.document_id)
        stored = await self.leftovers.find(collection, document.document_id, context)

        def told(outcome: corpus_pb2.IngestOutcome, passages: int) -> IngestedDocument:
            return IngestedDocument(
                document_id=document.document_id, version=version, passages=passages, outcome=outcome
            )

        if stored is not None and stored.version == version:
            return told(corpus_pb2.INGEST_OUTCOME_UNCHANGED, stored.passages)
        metadata = struct_of(document.metadata)
        if header.dry_run:
            count = await asyncio.to_thread(sum, (1 for _ in document.passages))
        else:
            count = await self._stage(header, document, version, metadata, context)
        if not count:
            raise InvalidRequestError("content", f"document {document.document_id!r} has no text")
        if header.dry_run:
            return told(corpus_pb2.INGEST_OUTCOME_REPLACED if stored else corpus_pb2.INGEST_OUTCOME_CREATED, count)
        if stored is not None:
            # Before as well as after: when the cache cannot be reached, nothing has changed yet and a second try
            # finds it so; what a question encodes again between the two is purged by the other.
            await self.leftovers.purge(collection, document.document_id, context)
        commit = retriever_pb2.CommitDocumentRequest(
            context=context,
            collection=collection,
            document_id=document.document_id,
            version=version,
            title=document.title,
            metadata=metadata,
            passages=count,
            source=source,
        )
        try:
            committed = await self.index.commit_document(commit)
        except InvalidRequestError as error:
            # All were staged: somebody removed them, with the document or the collection.
            raise UnavailableError(
                f"document {document.document_id!r} was removed while it was stored; send it again"
            ) from error
        replaced = bool(committed.replaced_version)
        if replaced:
            await self.leftovers.purge(collection, document.document_id, context)
        return told(corpus_pb2.INGEST_OUTCOME_REPLACED if replaced else corpus_pb2.INGEST_OUTCOME_CREATED, count)

    async def _stage(
        self,
        header: corpus_pb2.DocumentHeader,
        document: PreparedDocument,
        version: str,
        metadata: Struct,
        context: RequestContext,
    ) -> int:
        count = 0
        while texts := await asyncio.to_thread(list, itertools.islice(document.passages, self.batch_passages)):
            passages = [
                Passage(
                    document_id=document.document_id,
                    document_version=version,
                    ordinal=count + place,
                    title=document.passage_title,
                    text=text,
                    metadata=metadata,
                )
                for place, text in enumerate(texts)
            ]
            await self.index.add_passages(
                retriever_pb2.AddPassagesRequest(
                    context=context, collection=header.collection, passages=passages, language=header.language
                )
            )
            count += len(passages)
        return count


def _version_from(version: str, source: str, document_id: str) -> str:
    """The version, told from the same content of another source. A file that is its own source says nothing more."""
    return version if source == document_id else hashlib.sha256(f"{version} from {source}".encode()).hexdigest()


MAX_PIECE_BYTES = 2**20
_MEMORY_BYTES = 2**20
_DRAIN_S = 5.0
_LEAST_BYTES = 2**16

Message = IngestDocumentRequest | MalformedRequest


@asynccontextmanager
async def refused_gently(stream: AsyncIterator[Message], max_bytes: int) -> AsyncIterator[None]:
    """Reads what a client still sends before an error of ours reaches it.

    A status that overtakes the client's messages is lost: its gRPC reports the failed write instead. Gives up after
    ``max_bytes`` or a few seconds.
    """
    try:
        yield
    except BlockragError:
        left = max_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                async for message in stream:
                    left -= 0 if isinstance(message, MalformedRequest) else len(message.content)
                    if left < 0:
                        break
        raise


async def while_it_moves(stream: AsyncIterator[Message], idle_s: float) -> AsyncIterator[Message]:
    """The messages of ``stream``.

    Raises ``DeadlineError`` when the next one takes longer than ``idle_s``, and when so little comes that an upload of
    any size would hold its place: less than 64 KiB in each ``idle_s`` since the start, the first not counted.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + 2 * idle_s
    while True:
        try:
            async with asyncio.timeout(idle_s):
                message = await anext(stream, None)
        except TimeoutError as error:
            raise DeadlineError(f"the upload sent nothing for {idle_s:g} s") from error
        if message is None:
            return
        if not isinstance(message, MalformedRequest):
            until += idle_s * len(message.content) / _LEAST_BYTES
        if loop.time() > until:
            raise DeadlineError(f"the upload sends less than {_LEAST_BYTES // 2**10} KiB in {idle_s:g} s")
        yield message


async def receive_header(stream: AsyncIterator[Message]) -> DocumentHeader:
    """The first message, which must be the header."""
    first = await anext(stream, None)
    if isinstance(first, MalformedRequest):
        raise first.error()
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidRequestError("header", "must be the first message")
    return first.header


async def receive_content(stream: AsyncIterator[Message], max_bytes: int) -> BinaryIO:
    """The content, in a file that is gone when it is closed; small content stays in memory.

    Raises ``InvalidRequestError`` for anything but content, an oversized piece, or more than ``max_bytes`` in all;
    then the file is closed.
    """
    file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES))  # noqa: SIM115  (the caller closes it)
    try:
        received = 0
        async for message in stream:
            if isinstance(message, MalformedRequest):
                raise message.error()
            if message.WhichOneof("part") != "content":
                raise InvalidRequestError("content", "only the first message may be a header; then comes content")
            piece = message.content
            if len(piece) > MAX_PIECE_BYTES:
                raise InvalidRequestError(
                    "content", f"a piece has {len(piece)} bytes; at most {MAX_PIECE_BYTES} are allowed"
                )
            received += len(piece)
            if received > max_bytes:
                raise InvalidRequestError(
                    "content", f"the document is larger than the {max_bytes // 2**20} MiB that are allowed"
                )
            file.write(piece)
        return file
    except BaseException:
        file.close()
        raise
