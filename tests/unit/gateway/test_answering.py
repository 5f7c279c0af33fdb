"""The way of one question, with services by hand."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from blockrag.compressor.compression_request import CompressionRequest
from blockrag.errors import DeadlineError, InvalidRequestError, UnavailableError
from blockrag.gateway import validation
from blockrag.gateway.answering import STAGES, Deadline, Timings
from blockrag.gateway.planning import Overhead
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    ATTENTION_MODE_FULL,
    ATTENTION_MODE_NONE,
    CHUNK_FORM_COMPRESSED,
    CHUNK_FORM_EXPANDED,
    FINISH_REASON_END,
    BlockSlots,
    ChunkDecision,
    Compression,
)
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse
from blockrag.v1.rag_pb2 import GenerateRequest, GivenPassage
from blockrag.v1.retriever_pb2 import SearchRequest

from .fakes import FakeDecoder, FakePlanner, FakeSearcher, forever
from .questions import ABILITY, LIMITS, PASSAGES, answering, collect, request_span


async def test_the_stream_is_retrieved_text_completion() -> None:
    decoder = FakeDecoder()
    events = await collect(answering(decoder=decoder), top_k=2, seed=7)
    assert [event.WhichOneof("event") for event in events] == ["retrieved", "text", "text", "completion"]
    assert {event.request_id for event in events} == {"r1"}
    assert [passage.passage_id for passage in events[0].retrieved.passages] == ["p0", "p1"]
    done = events[-1].completion
    assert done.answer == "Oslo."
    assert done.finish_reason == FINISH_REASON_END
    assert done.usage.l1_tokens == 40
    assert done.seed == 7
    assert done.bundle_fingerprint == "f00d"
    assert done.attention_mode == ATTENTION_MODE_BLOCK
    assert done.trace_id == "a" * 32
    assert tuple(stage.stage for stage in done.stages) == STAGES
    took = {stage.stage: stage.milliseconds for stage in done.stages}
    assert took["prefill"] == 3.0
    assert took["retrieve"] > 0
    assert 0 < done.time_to_first_token_ms <= took["total"]
    assert decoder.closed == 0


async def test_services_get_the_requests_context() -> None:
    searcher, planner, decoder = FakeSearcher(PASSAGES), FakePlanner(), FakeDecoder()
    await collect(answering(searcher, planner, decoder), collection="almanac", max_context_tokens=300, max_tokens=9)
    for request in (searcher.requests[0], planner.requests[0], decoder.requests[0]):
        assert request.context.tenant == "acme"
        assert request.context.request_id == "r1"
    assert searcher.requests[0].collection == "almanac"
    assert planner.requests[0].max_context_tokens == 300
    assert planner.requests[0].max_tokens == 9
    assert decoder.requests[0].sampling.max_tokens == 9


async def test_citations_say_what_was_in_the_prompt_and_why_not() -> None:
    decoder = FakeDecoder()
    events = await collect(answering(planner=FakePlanner(fits=2), decoder=decoder), top_k=3)
    citations = events[-1].completion.citations
    assert [citation.in_prompt for citation in citations] == [True, True, False]
    assert [citation.index for citation in citations] == [0, 1, 2]
    assert citations[0].title == "T0"
    assert citations[0].tokens == 3
    assert citations[2].dropped_reason == "over the token budget"
    blocks = decoder.requests[0].blocks
    assert [block.document_id for block in blocks] == ["", "d1", "d0"]  # the best is next to the question
    assert [citation.place for citation in citations] == [2, 1, 0]
    assert [block.collection for block in blocks] == ["", "default", "default"]
    assert list(blocks[0].token_ids) == [1]


async def test_the_best_passage_may_come_first() -> None:
    decoder = FakeDecoder()
    events = await collect(replace(answering(decoder=decoder), best_last=False), top_k=3)
    assert [block.document_id for block in decoder.requests[0].blocks] == ["", "d0", "d1", "d2"]
    assert [citation.place for citation in events[-1].completion.citations] == [1, 2, 3]


async def test_where_each_block_was_found_is_told_of_it() -> None:
    events = await collect(answering(planner=FakePlanner(fits=2)), top_k=3)
    done = events[-1].completion
    assert done.instruction_slots == BlockSlots(l1=1)
    assert [citation.slots.l1 for citation in done.citations] == [3, 3, 0]
    assert not done.citations[2].HasField("slots")
    assert not done.turn_slots


async def test_given_passages_are_not_retrieved() -> None:
    searcher, decoder = FakeSearcher(PASSAGES), FakeDecoder()
    given = [GivenPassage(title="A", text="one two"), GivenPassage(text="three")]
    events = await collect(answering(searcher, decoder=decoder), passages=given)
    assert searcher.requests == []
    assert [passage.passage_id for passage in events[0].retrieved.passages] == ["given-0", "given-1"]
    assert [block.document_id for block in decoder.requests[0].blocks] == ["", "", ""]
    assert [block.collection for block in decoder.requests[0].blocks] == ["", "", ""]
    assert [citation.passage_id for citation in events[-1].completion.citations] == ["given-0", "given-1"]
    assert [citation.place for citation in events[-1].completion.citations] == [1, 2], "in the request's order"


async def test_a_plan_knows_the_language_of_the_collection_not_of_given_passages() -> None:
    planner = FakePlanner()
    asking = answering(FakeSearcher(PASSAGES, language="german"), planner)
    await collect(asking, collection="almanac")
    await collect(asking, passages=[GivenPassage(text="one two")])
    await collect(asking, attention_mode=ATTENTION_MODE_NONE)
    assert [request.language for request in planner.requests] == ["german", "", ""]


async def test_mode_none_uses_no_passages() -> None:
    searcher, decoder = FakeSearcher(PASSAGES), FakeDecoder()
    events = await collect(answering(searcher, decoder=decoder), attention_mode=ATTENTION_MODE_NONE)
    assert searcher.requests == []
    assert not events[0].retrieved.passages
    assert len(decoder.requests[0].blocks) == 1
    assert decoder.requests[0].attention_mode == ATTENTION_MODE_NONE
    assert not events[-1].completion.citations


async def test_mode_full_reaches_the_decoder() -> None:
    decoder = FakeDecoder()
    await collect(answering(decoder=decoder), attention_mode=ATTENTION_MODE_FULL)
    assert decoder.requests[0].attention_mode == ATTENTION_MODE_FULL


async def test_a_decoder_lost_before_its_first_token_is_tried_once_more() -> None:
    decoder = FakeDecoder(failures=[(0, UnavailableError("gone"))])
    events = await collect(answering(decoder=decoder), seed=5)
    assert events[-1].completion.answer == "Oslo."
    assert len(decoder.requests) == 2
    assert decoder.requests[0].sampling == decoder.requests[1].sampling


async def test_a_decoder_lost_twice_is_reported() -> None:
    decoder = FakeDecoder(failures=[(0, UnavailableError("gone")), (0, UnavailableError("gone again"))])
    with pytest.raises(UnavailableError, match="gone again"):
        await collect(answering(decoder=decoder))
    assert len(decoder.requests) == 2


async def test_a_decoder_lost_after_its_first_token_is_not_retried_but_says_how() -> None:
    decoder = FakeDecoder(failures=[(1, UnavailableError("gone"))])
    with pytest.raises(UnavailableError, match=r"after 1 tokens .* seed=5"):
        await collect(answering(decoder=decoder), seed=5)
    assert len(decoder.requests) == 1


async def test_other_errors_are_not_retried() -> None:
    decoder = FakeDecoder(failures=[(0, InvalidRequestError("max_tokens", "too many"))])
    with pytest.raises(InvalidRequestError):
        await collect(answering(decoder=decoder))
    assert len(decoder.requests) == 1


async def test_a_stream_without_its_finish_is_an_error() -> None:
    with pytest.raises(UnavailableError):
        await collect(answering(decoder=FakeDecoder(finish=False)))


async def test_the_deadline_stops_a_slow_search() -> None:
    started = time.perf_counter()
    with pytest.raises(DeadlineError, match="50 ms"):
        await collect(answering(FakeSearcher(PASSAGES, delay=forever)), timeout_ms=50)
    assert time.perf_counter() - started < 5


async def test_the_deadline_stops_the_decoder() -> None:
    decoder = FakeDecoder(delay=forever)
    with pytest.raises(DeadlineError):
        await collect(answering(decoder=decoder), timeout_ms=50)
    assert decoder.closed == 1


async def test_a_client_that_leaves_stops_the_decoder() -> None:
    decoder = FakeDecoder(words=["word "] * 1000)
    question = validation.check_generate(GenerateRequest(question="q"), LIMITS, ABILITY)
    with request_span() as current:
        events = answering(decoder=decoder).answer(question, current, Timings(0.0), Deadline(10_000))
        seen = [await anext(events) for _ in range(3)]
        await events.aclose()
    assert seen[-1].text.text == "word "
    assert decoder.closed == 1


async def test_a_cancelled_task_stops_the_decoder() -> None:
    decoding = asyncio.Event()

    async def starts_and_waits() -> None:
        decoding.set()
        await forever()

    decoder = FakeDecoder(delay=starts_and_waits)
    task = asyncio.create_task(collect(answering(decoder=decoder)))
    async with asyncio.timeout(5):
        await decoding.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert decoder.closed == 1


async def test_a_timeout_inside_a_service_is_not_taken_for_the_deadline() -> None:
    async def times_out() -> None:
        raise TimeoutError("inner")

    with pytest.raises(TimeoutError, match="inner"):
        await collect(answering(FakeSearcher(PASSAGES, delay=times_out)))


async def test_retrieve_alone() -> None:
    search = SearchRequest(query="q", collection="default", top_k=3)
    with request_span() as current:
        response = await answering().retrieve(search, current, Deadline(1000))
    assert [passage.passage_id for passage in response.passages] == ["p0", "p1", "p2"]
    assert [stage.stage for stage in response.stages] == ["retrieve", "total"]


async def test_the_plan_is_made_while_the_passages_are_sent() -> None:
    """The client's reading of the first message does not delay the plan; leaving then stops it."""
    started, ended = asyncio.Event(), asyncio.Event()

    class SlowPlanner(FakePlanner):
        async def plan(self, request: PlanRequest, compression: CompressionRequest | None) -> PlanResponse:
            started.set()
            try:
                await forever()
            finally:
                ended.set()
            raise AssertionError

    question = validation.check_generate(GenerateRequest(question="Where?"), LIMITS, ABILITY)
    with request_span() as current:
        timings = Timings(received=time.perf_counter())
        events = answering(planner=SlowPlanner()).answer(question, current, timings, Deadline(question.timeout_ms))
        assert (await anext(events)).HasField("retrieved")
        async with asyncio.timeout(5):
            await started.wait()
        await events.aclose()
    assert ended.is_set()


class MixingPlanner(FakePlanner):
    """Compresses the second chunk of every other passage; chunks have two tokens."""

    async def plan(self, request: PlanRequest, compression: CompressionRequest | None) -> PlanResponse:
        response = await super().plan(request, compression)
        response.chunk_tokens = 2
        for place, planned in enumerate(response.passages):
            second = CHUNK_FORM_EXPANDED if place % 2 else CHUNK_FORM_COMPRESSED
            del planned.chunks[:]
            planned.chunks.extend(
                [
                    ChunkDecision(start_token=0, end_token=2, form=CHUNK_FORM_EXPANDED, text="a b"),
                    ChunkDecision(start_token=2, end_token=3, form=second, text=" c"),
                ]
            )
        return response


async def test_mixtures_reach_the_decoder_and_are_cited_with_their_words() -> None:
    planner, decoder = MixingPlanner(), FakeDecoder()
    events = await collect(
        answering(planner=planner, decoder=decoder), top_k=3, collection="c", compression=Compression(rate=1.5)
    )
    [asked] = planner.requests
    assert asked.compression == Compression(rate=1.5, policy="query")
    assert asked.collection == "c"
    instruction, third, whole, mixed = decoder.requests[0].blocks
    assert (list(mixed.forms), mixed.chunk_tokens) == ([CHUNK_FORM_EXPANDED, CHUNK_FORM_COMPRESSED], 2)
    for block in (instruction, whole):
        assert (list(block.forms), block.chunk_tokens) == ([], 0)
    assert (third.document_id, third.collection) == ("d2", "c")
    done = events[-1].completion
    assert [chunk.text for chunk in done.citations[0].chunks] == ["a b", " c"]
    assert [chunk.form for chunk in done.citations[0].chunks] == list(mixed.forms)


async def test_without_compression_the_plan_hears_nothing_of_it() -> None:
    planner, decoder = FakePlanner(), FakeDecoder()
    await collect(answering(planner=planner, decoder=decoder), compression=Compression())
    [asked] = planner.requests
    assert not asked.HasField("compression")
    assert (asked.collection, asked.spent_ms) == ("", 0.0)
    assert not any(block.forms for block in decoder.requests[0].blocks)


async def test_the_passages_tokens_are_counted_before_compression() -> None:
    events = await collect(answering(planner=FakePlanner(fits=2)), top_k=4)
    assert events[-1].completion.usage.context_tokens == 6


async def test_a_plan_for_a_latency_hears_what_is_spent_elsewhere() -> None:
    planner = FakePlanner()
    service = answering(planner=planner)
    service.overhead.record(50.0, {})
    await collect(service, compression=Compression(max_ttft_ms=100))
    assert 50.0 < planner.requests[0].spent_ms < 100.0


class Late(Overhead):
    """Answers that were late."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[float] = []

    def record_expected(self, time_to_first_token_ms: float, expected_ms: float) -> None:
        self.expected.append(expected_ms)

    def margin_ms(self, max_ttft_ms: float) -> float:
        return 0.3 * max_ttft_ms


async def test_such_plans_leave_time_free_where_the_latest_were_late() -> None:
    planner, late = FakePlanner(expected_ms=95.0), Late()
    service = replace(answering(planner=planner), overhead=late)
    await collect(service, compression=Compression(max_ttft_ms=100))
    planner.expected_ms = 0.0
    await collect(service, compression=Compression(rate=4))
    assert [asked.margin_ms for asked in planner.requests] == [30.0, 0.0]
    assert late.expected == [95.0]


@pytest.mark.parametrize(("rate", "counts"), [(2, True), (4, False)])
async def test_answers_that_sizes_plan_do_not_hide_what_the_call_to_the_compressor_takes(
    rate: int, counts: bool
) -> None:
    service = answering()
    service.overhead.record(1e6, {}, by_compressor=True)
    await collect(service, compression=Compression(rate=rate))
    assert (service.overhead.milliseconds < 1e6) is counts
