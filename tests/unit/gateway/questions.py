"""Questions put to ``Answering`` with services by hand."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from blockrag.compressor.compression_request import CompressionAbility
from blockrag.gateway import validation
from blockrag.gateway.answering import Answering, Deadline, Timings
from blockrag.settings import GatewaySettings
from blockrag.telemetry import Span, span
from blockrag.v1.common_pb2 import (
    Passage,
    RequestContext,
)
from blockrag.v1.rag_pb2 import GenerateRequest, GenerateResponse

from .fakes import FakeDecoder, FakePlanner, FakeSearcher

LIMITS = GatewaySettings()
ABILITY = CompressionAbility("reader", 4, frozenset({"query"}))
PASSAGES = [
    Passage(passage_id=f"p{place}", document_id=f"d{place}", title=f"T{place}", text="a b c", score=1 / (place + 1))
    for place in range(10)
]


@contextmanager
def request_span() -> Iterator[Span]:
    with span("test", RequestContext(request_id="r1", tenant="acme", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")) as it:
        yield it


async def collect(answering: Answering, **fields: Any) -> list[GenerateResponse]:
    question = validation.check_generate(GenerateRequest(**{"question": "Where?", **fields}), LIMITS, ABILITY)
    with request_span() as current:
        timings = Timings(received=time.perf_counter())
        events = answering.answer(question, current, timings, Deadline(question.timeout_ms))
        return await collected(events)


async def collected(events: AsyncIterator[GenerateResponse]) -> list[GenerateResponse]:
    return [event async for event in events]


def answering(
    searcher: FakeSearcher | None = None, planner: FakePlanner | None = None, decoder: FakeDecoder | None = None
) -> Answering:
    return Answering(
        searcher or FakeSearcher(PASSAGES), planner or FakePlanner(), decoder or FakeDecoder(), "f00d", "tiny"
    )
