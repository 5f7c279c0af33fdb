"""What a tenant may store, on the real embedded index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from blockrag.errors import OverloadedError
from blockrag.identity import CollectionId
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.rpcs import StorageQuotas
from blockrag.retriever.vector_index import VectorIndex
from blockrag.tenants import NO_LIMITS, TenantLimits
from tests.unit.retriever.passages import EMBEDDING, document, embedded

OTHER = CollectionId("umbrella", "default")


@pytest.fixture
async def index(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VectorIndex]:
    made = EdgeIndex(tmp_path_factory.mktemp("index"), EMBEDDING)
    yield made
    await made.close()


async def store(quotas: StorageQuotas, index: VectorIndex, collection: CollectionId, document_id: str) -> None:
    async with quotas.storing(collection, document_id):
        await index.stage(collection, [embedded(document_id, "v1", 0, collection=collection)])
    async with quotas.storing(collection, document_id):
        await index.commit(collection, document(document_id, "v1", 1))


def acme(name: str = "default") -> CollectionId:
    return CollectionId("acme", name)


async def test_each_limit_is_named_and_is_its_tenant_s_own(index: VectorIndex) -> None:
    limits = {"acme": TenantLimits(collections=2, documents=3)}
    quotas = StorageQuotas(index, lambda tenant: limits.get(tenant, NO_LIMITS))
    await store(quotas, index, acme(), "a")
    await store(quotas, index, acme("second"), "b")
    with pytest.raises(OverloadedError, match="2 collections of 2") as refused:
        await store(quotas, index, acme("third"), "c")
    assert refused.value.retry_after_ms >= 1000
    await store(quotas, index, acme(), "c")
    with pytest.raises(OverloadedError, match="3 documents of 3"):
        await store(quotas, index, acme(), "d")
    await store(quotas, index, acme(), "a")  # it is there already
    for number in range(5):
        await store(quotas, index, OTHER, f"u{number}")

    await index.remove_document(acme(), "c")
    await store(quotas, index, acme(), "d")
    limits["acme"] = TenantLimits(documents=4)
    await store(quotas, index, acme("third"), "e")


async def test_of_documents_sent_at_once_no_more_than_the_limit_become_visible(index: VectorIndex) -> None:
    quotas = StorageQuotas(index, lambda _: TenantLimits(documents=4))
    outcomes = await asyncio.gather(
        *(store(quotas, index, acme(f"c{number % 3}"), f"d{number}") for number in range(12)), return_exceptions=True
    )
    assert outcomes.count(None) == 4
    assert all(isinstance(outcome, OverloadedError) for outcome in outcomes if outcome is not None)
    assert sum([(await index.counts(one)).documents for one in await index.collections("acme")]) == 4


async def test_bytes_on_disk_are_limited(index: VectorIndex) -> None:
    quotas = StorageQuotas(index, lambda _: TenantLimits(index_mb=1))
    passages = [embedded("big", "v1", number, collection=acme()) for number in range(2000)]
    await index.stage(acme(), passages)
    await index.commit(acme(), document("big", "v1", 2000))
    with pytest.raises(OverloadedError, match=r"MiB of the index's 1"):
        await store(quotas, index, acme(), "more")
    await store(quotas, index, OTHER, "other")
    await index.remove_collection(acme())
    await store(quotas, index, acme(), "more")
