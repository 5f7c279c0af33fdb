from __future__ import annotations

import pytest

from blockrag.errors import InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.messages import DocumentId, ShardStats, TenantUsage
from blockrag.kv_cache.requests import block_requests, document_ids, status_response
from blockrag.v1.common_pb2 import PromptBlock, RequestContext
from blockrag.v1.kv_cache_pb2 import DocumentRef

KEYS = KeyMaker("fingerprint", b"secret")
CONTEXT = RequestContext(tenant="t", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")


def test_blocks_become_requests_with_the_tenants_keys() -> None:
    [first, second] = block_requests(
        KEYS,
        CONTEXT,
        [PromptBlock(token_ids=[1, 2, 3], document_id="d", collection="c"), PromptBlock(token_ids=[1])],
    )
    assert first.key == KEYS.block_key("t", [1, 2, 3])
    assert first.token_ids.tolist() == [1, 2, 3]
    assert (first.tenant, first.collection, first.document_id) == ("t", "c", "d")
    assert first.traceparent == CONTEXT.traceparent
    assert (second.collection, second.document_id) == ("", "")


@pytest.mark.parametrize("token_ids", [[], [2**31]])
def test_impossible_blocks_are_named(token_ids: list[int]) -> None:
    with pytest.raises(InvalidRequestError, match=r"blocks\[1\]\.token_ids"):
        block_requests(KEYS, CONTEXT, [PromptBlock(token_ids=[1]), PromptBlock(token_ids=token_ids)])


def test_a_call_without_a_tenant_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"context\.tenant"):
        block_requests(KEYS, RequestContext(), [])
    with pytest.raises(InvalidRequestError, match=r"context\.tenant"):
        document_ids(RequestContext(), [])


def test_documents_are_the_tenants() -> None:
    found = document_ids(CONTEXT, [DocumentRef(collection="c", document_id="d"), DocumentRef(collection="c")])
    assert found == [DocumentId("t", "c", "d"), DocumentId("t", "c", "")]
    with pytest.raises(InvalidRequestError, match=r"documents\[0\]\.collection"):
        document_ids(CONTEXT, [DocumentRef(document_id="d")])


def test_shards_are_summed_up() -> None:
    stats = [
        ShardStats(2, 20, 50, 1, 3, 4, 5, 6, 7, 8, {"a": TenantUsage(1, 10), "b": TenantUsage(1, 10)}),
        ShardStats(1, 10, 50, 0, 1, 1, 1, 1, 1, 1, {"b": TenantUsage(1, 10)}),
    ]
    status = status_response(stats, 150)
    assert (status.blocks, status.bytes, status.budget_bytes, status.pinned_blocks) == (3, 30, 150, 1)
    assert (status.hits, status.misses, status.joined) == (4, 5, 6)
    assert (status.evictions, status.expirations, status.lost, status.shards) == (7, 8, 9, 2)
    assert [(tenant.tenant, tenant.blocks, tenant.bytes) for tenant in status.tenants] == [("a", 1, 10), ("b", 2, 20)]
