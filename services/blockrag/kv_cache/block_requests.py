"""From protobuf messages to block requests and documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from google.protobuf.message import Message

from blockrag.errors import InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import DocumentId, WarmOutcome
from blockrag.types import FULL, BlockForm, BlockRequest
from blockrag.v1 import common_pb2, kv_cache_pb2

_LARGEST_TOKEN_ID = 2**31 - 1


def block_forms(forms: Sequence[common_pb2.BlockForm], chunk_tokens: int) -> list[BlockForm]:
    """The forms named in a message, each once; none named: full only.

    ``chunk_tokens`` are those of the bundle's chunks, 0 when it cannot compress: then a compressed form raises
    ``InvalidRequestError``.
    """
    return [block_form(form, chunk_tokens, f"forms[{place}]") for place, form in enumerate(dict.fromkeys(forms))] or [
        FULL
    ]


def block_form(form: common_pb2.BlockForm, chunk_tokens: int, field: str) -> BlockForm:
    """One form of a message; unspecified is full. Raises ``InvalidRequestError`` naming ``field``."""
    if form in (common_pb2.BLOCK_FORM_UNSPECIFIED, common_pb2.BLOCK_FORM_FULL):
        return FULL
    if form not in (common_pb2.BLOCK_FORM_COMPRESSED, common_pb2.BLOCK_FORM_CHUNKS):
        raise InvalidRequestError(field, f"{form} is unknown")
    if not chunk_tokens:
        raise InvalidRequestError(field, "the bundle has no chunk encoder: there is the full form only")
    return BlockForm("compressed" if form == common_pb2.BLOCK_FORM_COMPRESSED else "chunks", chunk_tokens)


def block_requests(
    keys: KeyMaker,
    context: common_pb2.RequestContext,
    blocks: Iterable[common_pb2.PromptBlock],
    form: BlockForm = FULL,
) -> list[BlockRequest]:
    """Requests for a tenant's blocks in one form, with their keys. Raises ``InvalidRequestError`` naming the block."""
    tenant = tenant_of(context)
    requests = []
    for place, block in enumerate(blocks):
        if not block.token_ids:
            raise InvalidRequestError(f"blocks[{place}].token_ids", "a block needs at least one token")
        if max(block.token_ids) > _LARGEST_TOKEN_ID:
            raise InvalidRequestError(f"blocks[{place}].token_ids", "a token id is out of range")
        requests.append(
            keys.block_request(
                tenant,
                block.token_ids,
                form,
                collection=block.collection,
                document_id=block.document_id,
                traceparent=context.traceparent,
            )
        )
    return requests


def warm_response(by_form: Sequence[Sequence[BlockRequest]], outcome: WarmOutcome) -> kv_cache_pb2.WarmBlocksResponse:
    """What warming blocks did; ``by_form`` holds the same blocks, in the same order, in each form."""
    blocks = {
        tuple((request.key, request.collection, request.document_id) for request in forms)
        for forms in zip(*by_form, strict=True)
    }
    hits = sum(all(key not in outcome.encoded for key, _, _ in forms) for forms in blocks)
    return kv_cache_pb2.WarmBlocksResponse(
        hits=hits,
        encoded=len(blocks) - hits,
        encoded_bytes=outcome.encoded_bytes,
        over_budget=outcome.over_budget,
    )


def check_pinned(blocks: Iterable[common_pb2.PromptBlock]) -> None:
    """Raises ``InvalidRequestError`` for a block whose pin nobody could take away, since pins are set by document."""
    for place, block in enumerate(blocks):
        if not block.collection:
            raise InvalidRequestError(f"blocks[{place}].collection", "must not be empty where blocks are pinned")


def document_ids(context: common_pb2.RequestContext, documents: Iterable[kv_cache_pb2.DocumentRef]) -> list[DocumentId]:
    """A tenant's documents; an empty ``document_id`` stands for a whole collection."""
    tenant = tenant_of(context)
    found = []
    for place, document in enumerate(documents):
        if not document.collection:
            raise InvalidRequestError(f"documents[{place}].collection", "must not be empty")
        found.append(DocumentId(tenant, document.collection, document.document_id))
    return found


def tenant_of(context: common_pb2.RequestContext) -> str:
    """The tenant of a call; InvalidRequestError when it names none."""
    if not context.tenant:
        raise InvalidRequestError("context.tenant", "must not be empty")
    return context.tenant


def status_response(
    stats: Iterable[kv_cache_pb2.GetKvCacheStatusResponse], budget_bytes: int
) -> kv_cache_pb2.GetKvCacheStatusResponse:
    """The shards' numbers as one; ``budget_bytes`` is that of all shards, whether they answered or not."""
    status = kv_cache_pb2.GetKvCacheStatusResponse()
    tenants: defaultdict[str, kv_cache_pb2.TenantUsage] = defaultdict(kv_cache_pb2.TenantUsage)
    forms: defaultdict[str, kv_cache_pb2.FormUsage] = defaultdict(kv_cache_pb2.FormUsage)
    for shard in stats:
        add_counts(status, shard)
        add_counts(status.disk, shard.disk)
        for tenant in shard.tenants:
            add_counts(tenants[tenant.tenant], tenant)
        for form in shard.forms:
            add_counts(forms[form.form], form)
    status.budget_bytes = budget_bytes
    status.tenants.extend(tenants[name] for name in sorted(tenants))
    status.forms.extend(forms[name] for name in sorted(forms))
    return status


def add_counts(total: Message, part: Message) -> None:
    """Adds the counts of a message to those of another of its kind, which also says whose they are; warnings once."""
    for field, value in part.ListFields():
        if isinstance(value, int):
            setattr(total, field.name, getattr(total, field.name) + value)
        elif isinstance(value, str):
            setattr(total, field.name, value)
    if isinstance(total, kv_cache_pb2.DiskUsage) and isinstance(part, kv_cache_pb2.DiskUsage):
        total.warnings.extend(text for text in part.warnings if text not in total.warnings)
