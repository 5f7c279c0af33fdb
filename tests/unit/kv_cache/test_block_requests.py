from __future__ import annotations

import pytest

from blockrag.errors import InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.block_requests import (
    block_form,
    block_forms,
    block_requests,
    check_pinned,
    document_ids,
    status_response,
    warm_response,
)
from blockrag.kv_cache.shard_messages import DocumentId, WarmOutcome
from blockrag.types import FULL, BlockForm
from blockrag.v1.common_pb2 import (
    BLOCK_FORM_CHUNKS,
    BLOCK_FORM_COMPRESSED,
    BLOCK_FORM_FULL,
    PromptBlock,
    RequestContext,
)
from blockrag.v1.common_pb2 import BlockForm as BlockFormValue
from blockrag.v1.kv_cache_pb2 import DiskUsage, DocumentRef, FormUsage, GetKvCacheStatusResponse, TenantUsage

KEYS = KeyMaker("fingerprint", b"secret")
COUNTS = [field.name for field in GetKvCacheStatusResponse.DESCRIPTOR.fields][:11]
DISK_COUNTS = [field.name for field in DiskUsage.DESCRIPTOR.fields][:10]
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


def test_what_cannot_be_unpinned_is_not_pinned() -> None:
    pinned = [PromptBlock(token_ids=[1], collection="c"), PromptBlock(token_ids=[2], collection="c", document_id="d")]
    check_pinned(pinned)
    with pytest.raises(InvalidRequestError, match=r"blocks\[2\]\.collection"):
        check_pinned([*pinned, PromptBlock(token_ids=[3])])


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
        GetKvCacheStatusResponse(
            **dict(zip(COUNTS, (2, 20, 50, 1, 3, 4, 5, 6, 7, 8, 1), strict=True)),
            tenants=[TenantUsage(tenant="a", blocks=1, bytes=10), TenantUsage(tenant="b", blocks=1, bytes=10)],
            forms=[
                FormUsage(form="full", blocks=1, bytes=15, hits=2, misses=3),
                FormUsage(form="chunks-8", blocks=1, bytes=5, hits=1, misses=1),
            ],
        ),
        GetKvCacheStatusResponse(
            **dict(zip(COUNTS, (1, 10, 50, 0, 1, 1, 1, 1, 1, 1, 1), strict=True)),
            tenants=[TenantUsage(tenant="b", blocks=1, bytes=10)],
            forms=[FormUsage(form="full", blocks=1, bytes=10, hits=1, misses=1)],
            disk=DiskUsage(**dict(zip(DISK_COUNTS, range(1, 11), strict=True)), warnings=["full"]),
        ),
        GetKvCacheStatusResponse(
            shards=1, disk=DiskUsage(**dict(zip(DISK_COUNTS, range(10, 20), strict=True)), warnings=["full", "slow"])
        ),
    ]
    status = status_response(stats, 150)
    assert (status.blocks, status.bytes, status.budget_bytes, status.pinned_blocks) == (3, 30, 150, 1)
    assert (status.hits, status.misses, status.joined) == (4, 5, 6)
    assert (status.evictions, status.expirations, status.lost, status.shards) == (7, 8, 9, 3)
    disk = status.disk
    assert (disk.blocks, disk.bytes, disk.budget_bytes, disk.hits, disk.slower) == (11, 13, 15, 17, 19)
    assert (disk.written, disk.evictions, disk.rejected, disk.dropped, disk.pending) == (21, 23, 25, 27, 29)
    assert list(disk.warnings) == ["full", "slow"]
    assert [(tenant.tenant, tenant.blocks, tenant.bytes) for tenant in status.tenants] == [("a", 1, 10), ("b", 2, 20)]
    assert [(form.form, form.blocks, form.bytes, form.hits, form.misses) for form in status.forms] == [
        ("chunks-8", 1, 5, 1, 1),
        ("full", 2, 25, 3, 4),
    ]


def test_blocks_are_asked_for_in_each_form_once() -> None:
    assert block_forms([], 8) == [FULL]
    asked = [BLOCK_FORM_CHUNKS, BLOCK_FORM_FULL, BLOCK_FORM_COMPRESSED, BLOCK_FORM_CHUNKS]
    assert block_forms(asked, 8) == [BlockForm("chunks", 8), FULL, BlockForm("compressed", 8)]


@pytest.mark.parametrize("form", [BLOCK_FORM_COMPRESSED, BLOCK_FORM_CHUNKS])
def test_a_bundle_that_does_not_compress_has_the_full_form_only(form: BlockFormValue) -> None:
    assert block_forms([BLOCK_FORM_FULL], 0) == [FULL]
    with pytest.raises(InvalidRequestError, match=r"forms\[1\]: the bundle has no chunk encoder"):
        block_forms([BLOCK_FORM_FULL, form], 0)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"blocks\[3\]\.form: 77 is unknown"):
        block_form(77, 8, "blocks[3].form")  # type: ignore[arg-type]


def test_the_form_is_part_of_the_request_and_of_its_key() -> None:
    keys = KeyMaker("fingerprint", b"secret", "compression")
    form = BlockForm("compressed", 2)
    [block] = block_requests(keys, CONTEXT, [PromptBlock(token_ids=[1, 2, 3])], form)
    assert block.form == form
    assert block.size == 2
    assert block.key == keys.block_key("t", [1, 2, 3], form) != keys.block_key("t", [1, 2, 3])


def test_a_block_is_a_hit_when_every_form_of_it_is() -> None:
    keys = KeyMaker("fingerprint", b"secret", "compression")
    blocks = [PromptBlock(token_ids=[number]) for number in (1, 2, 2, 3)]
    by_form = [block_requests(keys, CONTEXT, blocks, form) for form in (FULL, BlockForm("chunks", 2))]
    encoded = {by_form[0][0].key, by_form[1][0].key, by_form[1][3].key}
    response = warm_response(by_form, WarmOutcome(3, frozenset(encoded), 300, True))
    assert (response.hits, response.encoded, response.encoded_bytes, response.over_budget) == (1, 2, 300, True)
    assert warm_response([[]], WarmOutcome()).hits == 0
