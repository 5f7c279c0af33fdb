"""What a tenant may store: checked where documents become visible, so whoever writes meets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from blockrag.errors import NotFoundError, OverloadedError
from blockrag.identity import CollectionId
from blockrag.limits import MIB
from blockrag.retriever.vector_index import VectorIndex
from blockrag.tenants import LimitsOf, TenantLimits

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
