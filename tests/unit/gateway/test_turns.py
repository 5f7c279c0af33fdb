"""An answered turn is encoded while its user reads, as the block that the next question's plan has."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from blockrag.errors import UnavailableError
from blockrag.gateway.validation import Question, check_generate
from blockrag.gateway.warming import AnsweredTurns, Which
from blockrag.v1.common_pb2 import ATTENTION_MODE_FULL, RequestContext, Turn
from blockrag.v1.kv_cache_pb2 import WarmBlocksRequest, WarmBlocksResponse
from blockrag.v1.rag_pb2 import GenerateRequest

from .questions import ABILITY, LIMITS

_CONTEXT = RequestContext(request_id="r", tenant="t", traceparent="spent")
_TURN = (Turn(question="before", answer="yes"),)


class Cache:
    """Remembers what it is asked to warm."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[WarmBlocksRequest] = []
        self.released = asyncio.Event()
        self.released.set()
        self._error = error

    async def warm_blocks(self, request: WarmBlocksRequest) -> WarmBlocksResponse:
        self.asked.append(request)
        await self.released.wait()
        if self._error is not None:
            raise self._error
        return WarmBlocksResponse()


def question(text: str, turns: tuple[Turn, ...] = ()) -> Question:
    return check_generate(GenerateRequest(question=text, turns=turns), LIMITS, ABILITY)


def turn_ids(asked: str, answer: str) -> list[int]:
    return [len(asked), len(answer)]


@pytest.mark.parametrize(
    ("which", "first", "later"), [("never", 0, 0), ("conversations", 0, 1), ("always", 1, 1)], ids=str
)
async def test_which_turns_are_encoded(which: Which, first: int, later: int) -> None:
    for turns, expected in (((), first), (_TURN, later)):
        cache = Cache()
        AnsweredTurns(which, turn_ids, cache).encode(question("why?", turns=turns), "because", _CONTEXT)
        await asyncio.sleep(0)
        assert len(cache.asked) == expected


async def test_the_block_is_the_tenants_and_nothing_of_the_request_that_is_over() -> None:
    cache = Cache()
    AnsweredTurns("always", turn_ids, cache).encode(question("why?"), "because", _CONTEXT)
    await asyncio.sleep(0)
    (asked,) = cache.asked
    assert [list(block.token_ids) for block in asked.blocks] == [[4, 7]]
    assert asked.context == RequestContext(request_id="r", tenant="t")
    assert not asked.pin


async def test_nothing_is_encoded_that_no_plan_would_read() -> None:
    cache = Cache()
    turns = AnsweredTurns("always", turn_ids, cache)
    turns.encode(replace(question("why?"), attention_mode=ATTENTION_MODE_FULL), "because", _CONTEXT)
    turns.encode(question("why?"), "", _CONTEXT)
    await asyncio.sleep(0)
    assert not cache.asked


async def test_what_fails_is_nobodys_error(caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(UnavailableError("gone"))
    turns = AnsweredTurns("always", turn_ids, cache)
    with caplog.at_level("INFO"):
        turns.encode(question("why?"), "because", _CONTEXT)
        await asyncio.sleep(0.01)
    assert "not encoded ahead: gone" in caplog.text


async def test_no_more_are_under_way_than_a_replica_may_have() -> None:
    cache = Cache()
    cache.released.clear()
    turns = AnsweredTurns("always", turn_ids, cache)
    for _ in range(40):
        turns.encode(question("why?"), "because", _CONTEXT)
    await asyncio.sleep(0)
    assert len(cache.asked) == 16
    cache.released.set()
    await asyncio.sleep(0.01)
    turns.encode(question("why?"), "because", _CONTEXT)
    await asyncio.sleep(0)
    assert len(cache.asked) == 17
