"""Hand-written services for the gateway's flows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

from blockrag.compressor.compression_request import CompressionRequest
from blockrag.errors import NotFoundError
from blockrag.gateway.corpus import Prepare
from blockrag.ingest.pipeline import PreparedDocument, SourceDocument
from blockrag.ingest.splitting import PassageSplitter
from blockrag.v1 import compressor_pb2, decoder_pb2, kv_cache_pb2, retriever_pb2
from blockrag.v1.common_pb2 import (
    CHUNK_FORM_DROPPED,
    CHUNK_FORM_EXPANDED,
    FINISH_REASON_END,
    BlockSlots,
    ChunkDecision,
    FinishReason,
    Passage,
    StageTime,
    Usage,
)
from tests.unit.ingest.reading import prepare_documents


async def nothing() -> None:
    """Does not wait."""


async def broken() -> None:
    """Fails."""
    raise ConnectionError("broken")


async def forever() -> None:
    """Waits until it is cancelled."""
    await asyncio.Event().wait()


@dataclass
class FakeSearcher:
    passages: Sequence[Passage] = ()
    delay: Callable[[], Awaitable[None]] = nothing
    requests: list[retriever_pb2.SearchRequest] = field(default_factory=list)
    language: str = "english"

    async def search(self, request: retriever_pb2.SearchRequest) -> retriever_pb2.SearchResponse:
        self.requests.append(request)
        await self.delay()
        return retriever_pb2.SearchResponse(passages=self.passages[: request.top_k], language=self.language)


@dataclass
class FakePlanner:
    """Expands the first ``fits`` passages; a block is one token per word."""

    fits: int = 100
    requests: list[compressor_pb2.PlanRequest] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    """Questions embedded ahead of their plan."""
    prepare: Callable[[], Awaitable[None]] = nothing
    expected_ms: float = 0.0

    async def prepare_question(
        self, request: compressor_pb2.PrepareQuestionRequest
    ) -> compressor_pb2.PrepareQuestionResponse:
        self.prepared.append(request.question)
        await self.prepare()
        return compressor_pb2.PrepareQuestionResponse()

    async def plan(
        self, request: compressor_pb2.PlanRequest, compression: CompressionRequest | None = None
    ) -> compressor_pb2.PlanResponse:
        self.requests.append(request)
        response = compressor_pb2.PlanResponse(
            instruction_token_ids=[1], final_token_ids=[9, 9], prompt_tokens=3, expected_ms=self.expected_ms
        )
        for place, passage in enumerate(request.passages):
            ids = list(range(len(passage.text.split())))
            kept = place < self.fits
            form = CHUNK_FORM_EXPANDED if kept else CHUNK_FORM_DROPPED
            response.passages.add(
                passage_id=passage.passage_id,
                document_id=passage.document_id,
                token_ids=ids,
                chunks=[ChunkDecision(start_token=0, end_token=len(ids), form=form)],
                in_prompt=kept,
                dropped_reason="" if kept else "over the token budget",
            )
        return response


@dataclass
class FakeDecoder:
    """Streams ``words``; ``failures`` holds, for each call, after how many words it raises what."""

    words: Sequence[str] = ("Oslo", ".")
    failures: list[tuple[int, Exception]] = field(default_factory=list)
    delay: Callable[[], Awaitable[None]] = nothing
    finish: bool = True
    reason: FinishReason = FINISH_REASON_END
    requests: list[decoder_pb2.DecodeRequest] = field(default_factory=list)
    closed: int = 0
    """Streams that ended before their finish."""

    async def decode(self, request: decoder_pb2.DecodeRequest) -> AsyncGenerator[decoder_pb2.DecodeResponse, None]:
        copy = decoder_pb2.DecodeRequest()
        copy.CopyFrom(request)
        self.requests.append(copy)
        after, error = self.failures.pop(0) if self.failures else (len(self.words) + 1, None)
        complete = False
        try:
            for place, word in enumerate(self.words):
                if place == after and error is not None:
                    raise error
                await self.delay()
                yield decoder_pb2.DecodeResponse(text=word, tokens=1)
            if self.finish:
                usage = Usage(prompt_tokens=50, cached_tokens=40, l1_tokens=40, completion_tokens=len(self.words))
                stages = [StageTime(stage="prefill", milliseconds=3.0), StageTime(stage="decode", milliseconds=5.0)]
                blocks = [BlockSlots(l1=len(block.token_ids)) for block in copy.blocks]
                complete = True
                yield decoder_pb2.DecodeResponse(
                    finish=decoder_pb2.DecodeFinish(reason=self.reason, usage=usage, stages=stages, blocks=blocks)
                )
        finally:
            self.closed += not complete


class FakeIndex:
    """Documents and passages in dictionaries, with the retriever's rules."""

    def __init__(self) -> None:
        self.documents: dict[tuple[str, str], retriever_pb2.StoredDocument] = {}
        self.staged: dict[tuple[str, str, str], list[Passage]] = {}
        self.calls: list[str] = []
        self.languages: dict[str, str] = {}
        self.fail_on = ""

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fail_on:
            raise ConnectionError(call)

    async def scan_documents(self, request: retriever_pb2.ScanDocumentsRequest) -> retriever_pb2.ScanDocumentsResponse:
        self._note("scan_documents")
        own = [document for (name, _), document in sorted(self.documents.items()) if name == request.collection]
        if request.document_ids:
            found = [document for document in own if document.document_id in request.document_ids]
        else:
            found = [document for document in own if document.document_id > request.after_document_id]
        return retriever_pb2.ScanDocumentsResponse(
            documents=found[: request.limit],
            total_documents=len(own),
        )

    async def scan_passages(self, request: retriever_pb2.ScanPassagesRequest) -> retriever_pb2.ScanPassagesResponse:
        self._note("scan_passages")
        assert 1 <= len(request.document_ids) <= 64
        response = retriever_pb2.ScanPassagesResponse()
        for name in sorted(request.document_ids):
            version = self.documents[(request.collection, name)].version
            response.passages.extend(self.staged[(request.collection, name, version)])
        return response

    async def scan_collections(
        self, request: retriever_pb2.ScanCollectionsRequest
    ) -> retriever_pb2.ScanCollectionsResponse:
        names = sorted({name for name, _ in self.documents})
        return retriever_pb2.ScanCollectionsResponse(
            collections=[retriever_pb2.StoredCollection(name=name, documents=1, passages=1) for name in names]
        )

    async def add_passages(self, request: retriever_pb2.AddPassagesRequest) -> retriever_pb2.AddPassagesResponse:
        self._note("add_passages")
        assert len(request.passages) <= 256
        self.languages.setdefault(request.collection, request.language)
        for passage in request.passages:
            key = (request.collection, passage.document_id, passage.document_version)
            staged = self.staged.setdefault(key, [])
            if passage.ordinal == len(staged):
                staged.append(passage)
        return retriever_pb2.AddPassagesResponse(added=len(request.passages))

    async def commit_document(
        self, request: retriever_pb2.CommitDocumentRequest
    ) -> retriever_pb2.CommitDocumentResponse:
        self._note("commit_document")
        key = (request.collection, request.document_id)
        assert len(self.staged[(*key, request.version)]) == request.passages
        old = self.documents.get(key)
        self.documents[key] = retriever_pb2.StoredDocument(
            document_id=request.document_id,
            version=request.version,
            title=request.title,
            passages=request.passages,
            metadata=request.metadata,
            source=request.source,
        )
        return retriever_pb2.CommitDocumentResponse(replaced_version=old.version if old else "")

    async def remove_document(
        self, request: retriever_pb2.RemoveDocumentRequest
    ) -> retriever_pb2.RemoveDocumentResponse:
        self._note("remove_document")
        removed = self.documents.pop((request.collection, request.document_id), None)
        if removed is None:
            raise NotFoundError(f"there is no document {request.document_id!r}")
        return retriever_pb2.RemoveDocumentResponse(passages=removed.passages)

    async def remove_collection(
        self, request: retriever_pb2.RemoveCollectionRequest
    ) -> retriever_pb2.RemoveCollectionResponse:
        self._note("remove_collection")
        keys = [key for key in self.documents if key[0] == request.collection]
        removed = [self.documents.pop(key) for key in keys]
        return retriever_pb2.RemoveCollectionResponse(
            documents=len(removed), passages=sum(document.passages for document in removed)
        )


class FakeCache:
    """Counts purges and warms blocks once."""

    def __init__(self) -> None:
        self.purged: list[tuple[str, str]] = []
        self.held: set[tuple[int, ...]] = set()
        self.batches: list[int] = []
        self.forms: list[list[int]] = []
        self.pinned = 0

    async def purge_documents(self, request: kv_cache_pb2.PurgeDocumentsRequest) -> kv_cache_pb2.PurgeDocumentsResponse:
        self.purged.extend((document.collection, document.document_id) for document in request.documents)
        return kv_cache_pb2.PurgeDocumentsResponse(blocks=2)

    async def warm_blocks(self, request: kv_cache_pb2.WarmBlocksRequest) -> kv_cache_pb2.WarmBlocksResponse:
        self.batches.append(len(request.blocks))
        self.forms.append(list(request.forms))
        self.pinned += len(request.blocks) if request.pin else 0
        blocks = {tuple(block.token_ids) for block in request.blocks}
        hits = len(blocks & self.held)
        self.held |= blocks
        encoded = len(blocks) - hits
        return kv_cache_pb2.WarmBlocksResponse(hits=hits, encoded=encoded, encoded_bytes=encoded * 100)


class FakeTokenizer:
    """One token for each character."""

    async def tokenize_passages(
        self, request: compressor_pb2.TokenizePassagesRequest
    ) -> compressor_pb2.TokenizePassagesResponse:
        response = compressor_pb2.TokenizePassagesResponse(instruction_token_ids=[0])
        for passage in request.passages:
            response.passages.add(
                passage_id=passage.passage_id,
                document_id=passage.document_id,
                token_ids=[ord(character) for character in passage.text],
            )
        return response


def preparing(splitter: PassageSplitter) -> Prepare:
    """Parses and splits in this process; the gateway has it done by others."""

    @asynccontextmanager
    async def prepare(spool: BinaryIO, source: SourceDocument) -> AsyncIterator[Iterator[PreparedDocument]]:
        with prepare_documents(spool, source, splitter) as prepared:
            yield prepared

    return prepare
