"""Encodes a collection's passages ahead of time, in bounded batches, and says how far it is; and an answered turn while
its user reads the answer, so that the next question finds it cached."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from blockrag.aio import detached
from blockrag.alike import alike
from blockrag.errors import NotFoundError
from blockrag.gateway.corpus import all_documents
from blockrag.gateway.validation import Question
from blockrag.handles import CompressorClient, KvCacheClient, RetrieverClient
from blockrag.telemetry import request_fields
from blockrag.v1 import compressor_pb2, corpus_pb2, kv_cache_pb2, retriever_pb2
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_FULL,
    BLOCK_FORM_CHUNKS,
    BLOCK_FORM_COMPRESSED,
    BLOCK_FORM_FULL,
    BlockForm,
    Passage,
    PromptBlock,
    RequestContext,
)
from blockrag.v1.kv_cache_pb2 import WarmBlocksRequest

ALL_FORMS = (BLOCK_FORM_FULL, BLOCK_FORM_COMPRESSED, BLOCK_FORM_CHUNKS)
"""What passages are warmed in where the bundle can compress."""

_SCAN_DOCUMENTS = 200
_GROUP_DOCUMENTS = 64
_GROUP_PASSAGES = 512
_BATCH_BLOCKS = 64


@dataclass(frozen=True)
class Warming:
    """Warms collections by means of the services it is given."""

    source: RetrieverClient
    tokenizer: CompressorClient
    cache: KvCacheClient
    forms: Sequence[BlockForm] = ()
    """Of the passages' blocks; empty: full only."""
    budget_bytes: int = 0
    """What the cache holds of a tenant's blocks; 0: not known, so a warming goes on to the end."""

    async def warm(
        self, collection: str, document_ids: Sequence[str], pin: bool, context: RequestContext
    ) -> AsyncGenerator[corpus_pb2.WarmResponse, None]:
        """Progress after each batch; the last one has done == total, or over_budget.

        A warming ends where the budget is full of its own blocks: going on would put out what it began with.

        ``document_ids`` empty: the whole collection. ``NotFoundError`` for an unknown collection or document. The
        block that all prompts share is warmed with the first batch, not counted and not pinned: every prompt uses it,
        and pins are taken away by document.
        """
        documents = await self._documents(collection, document_ids, context)
        progress = corpus_pb2.WarmResponse(total=sum(document.passages for document in documents))
        async for passages in self._passages(collection, documents, context):
            await self._warm_batch(collection, passages, pin, context, progress)
            # Documents may be replaced meanwhile: the sum grows rather than ends below what was done.
            progress.total = max(progress.total, progress.done)
            if progress.over_budget and self._full(progress):
                yield alike(corpus_pb2.WarmResponse, progress)
                return
            if progress.done < progress.total:
                yield alike(corpus_pb2.WarmResponse, progress)
        progress.total = progress.done
        yield alike(corpus_pb2.WarmResponse, progress)

    def _full(self, progress: corpus_pb2.WarmResponse) -> bool:
        """Whether another batch would not fit beside what was done, found warm or encoded."""
        encoded = progress.done - progress.hits
        if not self.budget_bytes or not encoded:
            return False
        return progress.encoded_bytes * (progress.done + _BATCH_BLOCKS) / encoded > self.budget_bytes

    async def _documents(
        self, collection: str, document_ids: Sequence[str], context: RequestContext
    ) -> list[retriever_pb2.StoredDocument]:
        if not document_ids:
            return [document async for document in all_documents(self.source, collection, context)]
        found: list[retriever_pb2.StoredDocument] = []
        for start in range(0, len(document_ids), _SCAN_DOCUMENTS):
            wanted = document_ids[start : start + _SCAN_DOCUMENTS]
            page = await self.source.scan_documents(
                retriever_pb2.ScanDocumentsRequest(
                    context=context, collection=collection, document_ids=wanted, limit=len(wanted)
                )
            )
            missing = set(wanted) - {document.document_id for document in page.documents}
            if missing:
                raise NotFoundError(f"no document {min(missing)!r} in collection {collection!r}")
            found.extend(page.documents)
        return found

    async def _passages(
        self, collection: str, documents: Sequence[retriever_pb2.StoredDocument], context: RequestContext
    ) -> AsyncIterator[Sequence[Passage]]:
        """Batches of at most ``_BATCH_BLOCKS`` passages."""
        for group in _groups(documents):
            found = await self.source.scan_passages(
                retriever_pb2.ScanPassagesRequest(context=context, collection=collection, document_ids=group)
            )
            for start in range(0, len(found.passages), _BATCH_BLOCKS):
                yield found.passages[start : start + _BATCH_BLOCKS]

    async def _warm_batch(
        self,
        collection: str,
        passages: Sequence[Passage],
        pin: bool,
        context: RequestContext,
        progress: corpus_pb2.WarmResponse,
    ) -> None:
        tokenized = await self.tokenizer.tokenize_passages(
            compressor_pb2.TokenizePassagesRequest(context=context, passages=passages)
        )
        blocks = [
            PromptBlock(token_ids=block.token_ids, document_id=block.document_id, collection=collection)
            for block in tokenized.passages
        ]
        if progress.done == 0:
            shared = [PromptBlock(token_ids=tokenized.instruction_token_ids)]
            await self.cache.warm_blocks(kv_cache_pb2.WarmBlocksRequest(context=context, blocks=shared))
        warmed = await self.cache.warm_blocks(
            kv_cache_pb2.WarmBlocksRequest(context=context, blocks=blocks, pin=pin, forms=self.forms)
        )
        progress.done += len(passages)
        progress.hits += warmed.hits
        progress.encoded_bytes += warmed.encoded_bytes
        progress.over_budget = progress.over_budget or warmed.over_budget


def _groups(documents: Sequence[retriever_pb2.StoredDocument]) -> list[list[str]]:
    """Ids of documents to scan together: few enough that their passages fit into a message."""
    groups: list[list[str]] = []
    passages = 0
    for document in documents:
        full = groups and (len(groups[-1]) >= _GROUP_DOCUMENTS or passages + document.passages > _GROUP_PASSAGES)
        if not groups or full:
            groups.append([])
            passages = 0
        groups[-1].append(document.document_id)
        passages += document.passages
    return groups


_logger = logging.getLogger(__name__)

Which = Literal["never", "conversations", "always"]

_MOST = 16
"""Turns under way; one more is left to the question that needs it."""


class AnsweredTurns:
    """Has the cache encode turns; for one event loop. Nobody waits for it, and what goes wrong costs a later wait."""

    def __init__(self, which: Which, turn_ids: Callable[[str, str], Sequence[int]], cache: KvCacheClient) -> None:
        """``turn_ids``: token ids of the block of a question and its answer, the same that a later plan makes."""
        self._which = which
        self._turn_ids = turn_ids
        self._cache = cache
        self._running: set[asyncio.Task[None]] = set()

    def encode(self, question: Question, answer: str, context: RequestContext) -> None:
        """Starts on the turn of ``question`` and its whole ``answer``, where the settings want that."""
        wanted = self._which == "always" or (self._which == "conversations" and question.turns)
        # in full mode a conversation is prefilled as a whole, and no block of it is read
        if not wanted or not answer or question.attention_mode == ATTENTION_MODE_FULL or len(self._running) >= _MOST:
            return
        own = RequestContext(request_id=context.request_id, tenant=context.tenant)
        task = detached(self._encode(question.text, answer, own))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _encode(self, question: str, answer: str, context: RequestContext) -> None:
        try:
            blocks = [PromptBlock(token_ids=self._turn_ids(question, answer))]
            await self._cache.warm_blocks(WarmBlocksRequest(context=context, blocks=blocks))
        except Exception as error:
            fields = request_fields(context)
            _logger.info("an answered turn was not encoded ahead: %s", error, extra=fields)
