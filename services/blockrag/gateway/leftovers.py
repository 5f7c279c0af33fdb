"""What a question that had found a document before its deletion brings back: its blocks, encoded and kept once more.

They are purged again when no question of that time can still be under way. Until then they are in cache and on disk,
and no answer to a later question has them, since the document is not found.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from dataclasses import dataclass

from blockrag.errors import NotFoundError, UnavailableError
from blockrag.handles import KvCacheClient, RetrieverClient
from blockrag.telemetry import request_fields
from blockrag.v1.common_pb2 import RequestContext
from blockrag.v1.kv_cache_pb2 import DocumentRef, PurgeDocumentsRequest
from blockrag.v1.retriever_pb2 import ScanDocumentsRequest, StoredDocument

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Deleted:
    due: float
    collection: str
    document_id: str
    """Empty: the whole collection."""
    context: RequestContext


class Leftovers:
    """Purges deleted documents once more; for one event loop. What is due when the process ends is left."""

    def __init__(self, index: RetrieverClient, cache: KvCacheClient, after_s: float) -> None:
        """``after_s``: longest time that a question may take."""
        self._index = index
        self.cache = cache
        self._after_s = after_s
        self._deleted: deque[_Deleted] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._purging: asyncio.Task[None] | None = None

    def deleted(self, collection: str, document_id: str, context: RequestContext) -> None:
        """A document, or with an empty id a collection, was deleted."""
        own = RequestContext(request_id=context.request_id, tenant=context.tenant)
        self._deleted.append(_Deleted(time.monotonic() + self._after_s, collection, document_id, own))
        self._wait()

    async def purge(self, collection: str, document_id: str, context: RequestContext) -> int:
        """Removes a document's blocks, with an empty id a collection's; returns how many."""
        document = DocumentRef(collection=collection, document_id=document_id)
        return (await self.cache.purge_documents(PurgeDocumentsRequest(context=context, documents=[document]))).blocks

    async def find(self, collection: str, document_id: str, context: RequestContext) -> StoredDocument | None:
        """The document, with an empty id any of the collection's; None where there is none."""
        wanted = [document_id] if document_id else []
        request = ScanDocumentsRequest(context=context, collection=collection, document_ids=wanted, limit=1)
        try:
            found = await self._index.scan_documents(request)
        except NotFoundError:  # the first document of a collection makes it
            return None
        return found.documents[0] if found.documents else None

    def _wait(self) -> None:
        if self._deleted and self._timer is None and self._purging is None:
            # a context of its own: it goes on after the request, whose deadline and span are none of it
            left = max(0.0, self._deleted[0].due - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(left, self._start, context=contextvars.Context())

    def _start(self) -> None:
        self._timer = None
        self._purging = asyncio.get_running_loop().create_task(self._purge_due())

    async def _purge_due(self) -> None:
        try:
            while self._deleted and self._deleted[0].due <= time.monotonic():
                one = self._deleted.popleft()
                try:
                    # where it is there again its blocks are read, and its next change purges them all
                    if await self.find(one.collection, one.document_id, one.context) is None:
                        await self.purge(one.collection, one.document_id, one.context)
                except Exception as error:
                    fields = request_fields(one.context)
                    if isinstance(error, UnavailableError):  # a service, a disk or a volume is away
                        self.deleted(one.collection, one.document_id, one.context)
                    _logger.warning("a deleted document was not purged once more: %s", error, extra=fields)
        finally:
            self._purging = None
            self._wait()
