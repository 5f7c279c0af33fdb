"""Warming in batches with progress."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockrag.errors import NotFoundError
from blockrag.gateway.warming import ALL_FORMS, Warming
from blockrag.v1.common_pb2 import BlockForm, Passage, RequestContext
from blockrag.v1.corpus_pb2 import WarmResponse
from blockrag.v1.retriever_pb2 import StoredDocument

from .fakes import FakeCache, FakeIndex, FakeTokenizer

CONTEXT = RequestContext(tenant="acme")


def index_of(passages_per_document: list[int]) -> FakeIndex:
    index = FakeIndex()
    for number, count in enumerate(passages_per_document):
        name = f"d{number:04}"
        index.documents[("default", name)] = StoredDocument(document_id=name, version="v1", passages=count)
        index.staged[("default", name, "v1")] = [
            Passage(passage_id=f"{name}-{place}", document_id=name, text=f"{name} {place}") for place in range(count)
        ]
    return index


async def warm(
    index: FakeIndex,
    cache: FakeCache,
    ids: list[str] | None = None,
    pin: bool = False,
    forms: Sequence[BlockForm] = (),
) -> list[WarmResponse]:
    warming = Warming(index, FakeTokenizer(), cache, forms)
    return [step async for step in warming.warm("default", ids or [], pin, CONTEXT)]


async def test_everything_is_warmed_in_bounded_batches() -> None:
    cache = FakeCache()
    steps = await warm(index_of([3] * 300 + [700]), cache)
    assert steps[-1].done == steps[-1].total == 1600
    assert steps[-1].hits == 0
    assert steps[-1].encoded_bytes == 160_000
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert all(step.total == 1600 for step in steps)
    assert max(cache.batches) <= 64
    assert (0,) in cache.held  # the instruction block, which all prompts share
    assert cache.pinned == 0


async def test_a_second_time_all_are_hits() -> None:
    index, cache = index_of([2, 2]), FakeCache()
    await warm(index, cache)
    (step,) = await warm(index, cache, pin=True)
    assert (step.done, step.total, step.hits, step.encoded_bytes) == (4, 4, 4, 0)
    assert cache.pinned == 4, "without the instruction block, which is no document's to unpin"


async def test_chosen_documents_only() -> None:
    (step,) = await warm(index_of([1, 2, 4]), FakeCache(), ["d0002", "d0000"])
    assert step.total == 5


async def test_an_unknown_document_is_named() -> None:
    with pytest.raises(NotFoundError, match="d0009"):
        await warm(index_of([1]), FakeCache(), ["d0000", "d0009"])


async def test_nothing_to_do() -> None:
    (step,) = await warm(index_of([]), FakeCache())
    assert (step.done, step.total) == (0, 0)


async def test_passages_are_warmed_in_every_form_and_what_all_prompts_share_in_one() -> None:
    cache = FakeCache()
    await warm(index_of([2]), cache, forms=ALL_FORMS)
    assert cache.forms == [[], list(ALL_FORMS)]
