"""A question embedded ahead of its plan, whatever becomes of its answer."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from blockrag.compressor.compression_request import CompressionRequest
from blockrag.gateway import validation
from blockrag.gateway.answering import Answering, Deadline, Timings
from blockrag.v1.common_pb2 import Compression
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse
from blockrag.v1.rag_pb2 import GenerateRequest, GenerateResponse, GivenPassage
from tests.unit.kv_cache.parts import settle

from .fakes import FakeDecoder, FakePlanner, FakeSearcher, broken, nothing
from .questions import ABILITY, LIMITS, PASSAGES, answering, collect, collected, request_span


@pytest.mark.parametrize("prepare", [nothing, broken])
async def test_a_question_is_embedded_while_its_passages_are_searched(prepare: Callable[[], Awaitable[None]]) -> None:
    planner = FakePlanner(prepare=prepare)
    searcher = FakeSearcher(PASSAGES, delay=settle)
    events = await collect(answering(searcher=searcher, planner=planner), compression=Compression(rate=2))
    assert events[-1].HasField("completion"), "what goes wrong ahead of the plan is the plan's to tell"
    assert planner.prepared == ["Where?"]


class Preparation:
    """Embeds a question until it is let go, and then ends or fails; notes how it ended."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.go = asyncio.Event()
        self.ended = ""
        self._failure = failure

    async def __call__(self) -> None:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "whole" if self._failure is None else "failed"
        if self._failure is not None:
            raise self._failure


@asynccontextmanager
async def compressed_answer(service: Answering) -> AsyncIterator[AsyncGenerator[GenerateResponse, None]]:
    """The events of an answer whose plan looks at the question; nothing that went wrong is left for asyncio to tell."""
    untold: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: untold.append(context))
    question = validation.check_generate(
        GenerateRequest(question="Where?", compression=Compression(rate=2)), LIMITS, ABILITY
    )
    with request_span() as current:
        timings = Timings(received=time.perf_counter())
        async with aclosing(service.answer(question, current, timings, Deadline(question.timeout_ms))) as events:
            yield events
    await settle()
    gc.collect()
    assert not untold


async def test_a_preparation_slower_than_the_search_is_not_cancelled() -> None:
    preparation = Preparation()

    class WaitingPlanner(FakePlanner):
        """Its plan needs what is being prepared."""

        async def plan(self, request: PlanRequest, compression: CompressionRequest | None) -> PlanResponse:
            assert preparation.ended == ""
            preparation.go.set()
            await settle()
            assert preparation.ended == "whole"
            return await super().plan(request, compression)

    async with compressed_answer(answering(planner=WaitingPlanner(prepare=preparation))) as events:
        assert (await collected(events))[-1].HasField("completion")


@pytest.mark.parametrize(("failure", "ending"), [(None, "whole"), (ConnectionError("broken"), "failed")])
async def test_a_preparation_slower_than_the_answer_comes_to_its_end(failure: Exception | None, ending: str) -> None:
    preparation = Preparation(failure)
    async with compressed_answer(answering(planner=FakePlanner(prepare=preparation))) as events:
        while not (await anext(events)).HasField("completion"):
            assert preparation.ended == ""
        last = asyncio.ensure_future(anext(events, None))
        await settle()
        assert not last.done(), "it is waited for when everything was sent"
        preparation.go.set()
        async with asyncio.timeout(5):
            assert await last is None
    assert preparation.ended == ending


async def test_a_preparation_that_does_not_end_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockrag.gateway.answering._PREPARING_GRACE_S", 0.01)
    preparation = Preparation()
    async with asyncio.timeout(5), compressed_answer(answering(planner=FakePlanner(prepare=preparation))) as events:
        assert (await collected(events))[-1].HasField("completion")
    assert preparation.ended == "cancelled"


@pytest.mark.parametrize("seen", [1, 2])
async def test_a_client_that_leaves_cancels_the_preparation(seen: int) -> None:
    preparation = Preparation()
    async with compressed_answer(answering(planner=FakePlanner(prepare=preparation))) as events:
        for _ in range(seen):
            await anext(events)
        assert preparation.ended == ""
        await events.aclose()
        assert preparation.ended == "cancelled"


async def breaks_later() -> None:
    await settle()
    await broken()


@pytest.mark.parametrize(
    "parts",
    [
        {"searcher": FakeSearcher(PASSAGES, delay=breaks_later)},
        {"decoder": FakeDecoder(failures=[(1, ConnectionError("broken"))])},
    ],
)
async def test_an_answer_that_fails_cancels_the_preparation(parts: dict[str, Any]) -> None:
    preparation = Preparation()
    async with compressed_answer(answering(planner=FakePlanner(prepare=preparation), **parts)) as events:
        with pytest.raises(ConnectionError):
            await collected(events)
        assert preparation.ended == "cancelled"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"compression": Compression(rate=2, policy="retrieval")},
        {"compression": Compression(max_ttft_ms=50, policy="retrieval")},
        {"compression": Compression(rate=4)},
        {"compression": Compression(rate=2), "passages": [GivenPassage(text="a b c")]},
    ],
)
async def test_nothing_is_embedded_where_nobody_looks_at_the_question(fields: dict[str, Any]) -> None:
    planner = FakePlanner()
    await collect(answering(planner=planner), **fields)
    assert planner.prepared == []
