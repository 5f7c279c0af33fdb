"""What a question from before a deletion may bring back is purged when none can be under way any more."""

from __future__ import annotations

import asyncio

import pytest

from blockrag.errors import UnavailableError
from blockrag.gateway.leftovers import Leftovers
from blockrag.v1.common_pb2 import RequestContext
from blockrag.v1.kv_cache_pb2 import PurgeDocumentsRequest, PurgeDocumentsResponse
from blockrag.v1.retriever_pb2 import StoredDocument
from tests.unit.decoder.fakes import until

from .fakes import FakeCache, FakeIndex

_CONTEXT = RequestContext(request_id="r", tenant="acme", traceparent="spent")
_AFTER_S = 0.05


class Cache(FakeCache):
    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[RequestContext] = []
        self.error: Exception | None = None

    async def purge_documents(self, request: PurgeDocumentsRequest) -> PurgeDocumentsResponse:
        self.contexts.append(request.context)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return await super().purge_documents(request)


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
def index() -> FakeIndex:
    return FakeIndex()


@pytest.fixture
def leftovers(index: FakeIndex, cache: Cache) -> Leftovers:
    return Leftovers(index, cache, _AFTER_S)


async def test_what_was_deleted_is_purged_once_more_and_not_at_once(leftovers: Leftovers, cache: Cache) -> None:
    leftovers.deleted("c", "a", _CONTEXT)
    leftovers.deleted("c", "", _CONTEXT)
    await asyncio.sleep(0)
    assert cache.purged == []
    await until(lambda: len(cache.purged) == 2)
    assert cache.purged == [("c", "a"), ("c", "")]
    assert {(context.tenant, context.traceparent) for context in cache.contexts} == {("acme", "")}


async def test_what_is_there_again_keeps_its_blocks(leftovers: Leftovers, index: FakeIndex, cache: Cache) -> None:
    for document_id in ("back", "gone"):
        leftovers.deleted("c", document_id, _CONTEXT)
    index.documents["c", "back"] = StoredDocument(document_id="back")
    leftovers.deleted("c", "", _CONTEXT)
    leftovers.deleted("other", "", _CONTEXT)
    await until(lambda: ("other", "") in cache.purged)
    assert cache.purged == [("c", "gone"), ("other", "")]


async def test_one_that_fails_leaves_the_others(leftovers: Leftovers, cache: Cache) -> None:
    cache.error = ConnectionError("away")
    for document_id in ("a", "b"):
        leftovers.deleted("c", document_id, _CONTEXT)
    await until(lambda: bool(cache.purged))
    assert cache.purged == [("c", "b")]
    assert len(cache.contexts) == 2, "the one that failed was tried, once"
    leftovers.deleted("c", "later", _CONTEXT)
    await until(lambda: len(cache.purged) == 2)
    assert cache.purged[1] == ("c", "later")


async def test_what_could_not_be_purged_for_a_while_is_tried_again(leftovers: Leftovers, cache: Cache) -> None:
    cache.error = UnavailableError("the volume is away")
    leftovers.deleted("c", "a", _CONTEXT)
    await until(lambda: bool(cache.purged))
    assert cache.purged == [("c", "a")]
    assert len(cache.contexts) == 2
