"""Plans for a time know where blocks are."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence

import pytest

from blockrag.compressor import ttft
from blockrag.compressor.plans import Planner
from blockrag.errors import InvalidRequestError, UnavailableError
from blockrag.kv_cache.shard_messages import WarmOutcome
from blockrag.modeling.bundle import Bundle
from blockrag.types import BlockRequest
from blockrag.v1.common_pb2 import CHUNK_FORM_DROPPED, Compression, Turn
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse
from blockrag.v1.decoder_pb2 import FetchCost
from tests.unit.compressor.planning import CHUNK, TEXTS, Decoder, make_planner, request, slots
from tests.unit.kv_cache.parts import settle

PLENTY = 10_000.0


FETCHES = [
    FetchCost(tier="store", base_ms=2.0),
    FetchCost(tier="disk", base_ms=20.0),
    FetchCost(tier="encoded", base_ms=800.0, token_ms=10.0),
]


class Places(Decoder):
    """10 ms and half a millisecond a slot; from the store 2 ms, from disk 20, a thousand for encoding.

    Every block is in the store but those of the passages that are ``elsewhere``.
    """

    def __init__(self, elsewhere: dict[int, str] | None = None, before: Sequence[str] = ("store",)) -> None:
        super().__init__(fetches=FETCHES)
        self.passages = dict.fromkeys(range(len(TEXTS)), "store") | (elsewhere or {})
        self.before = list(before)


def planner_over(bundle: Bundle, places: Places, like: Planner | None = None) -> Planner:
    return make_planner(bundle, like.mixer if like else None, places)


def timed(milliseconds: float, spent_ms: float = 5.0, policy: str = "retrieval", **fields: object) -> PlanRequest:
    return request(Compression(max_ttft_ms=milliseconds, policy=policy), spent_ms=spent_ms, **fields)


def read(plan: PlanResponse) -> list[bool]:
    return [passage.in_prompt for passage in plan.passages]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ttft, "_LONGEST_PAUSE_S", 0.0)


async def test_a_passage_that_must_be_encoded_is_left_out_where_there_is_no_time_for_it(plain: Bundle) -> None:
    planner = planner_over(plain, Places({1: "encoded"}))
    plan = await planner.plan(timed(400))
    assert read(plan) == [True, False, True, True]
    left = plan.passages[1]
    assert "not encoded yet" in left.dropped_reason
    assert {chunk.form for chunk in left.chunks} == {CHUNK_FORM_DROPPED}
    assert (left.passage_id, left.document_id) == ("p1", "d1")
    all_of_it = await planner.plan(timed(PLENTY))
    assert all(read(all_of_it))
    assert [passage.token_ids for passage in plan.passages] == [passage.token_ids for passage in all_of_it.passages]


async def test_what_came_too_late_is_brought_into_memory_for_the_next_question(plain: Bundle) -> None:
    places = Places({1: "encoded", 2: "disk", 3: "encoded"})
    planner = planner_over(plain, places)
    plan = await planner.plan(timed(30))
    await settle()
    assert read(plan)[1:] == [False, False, False]
    assert [block.document_id for block in places.warmed] == ["d1", "d2", "d3"]  # from disk too
    assert [list(block.token_ids) for block in places.warmed] == [
        list(passage.token_ids) for passage in plan.passages[1:]
    ]
    assert {(block.tenant, block.collection) for block in places.warmed} == {("t", "c")}
    places.warmed.clear()
    await planner.plan(timed(PLENTY))  # these are fetched for the answer itself
    await settle()
    assert not places.warmed


async def test_a_refused_question_and_given_passages_have_nothing_encoded(plain: Bundle) -> None:
    places = Places(dict.fromkeys(range(4), "encoded"))
    planner = planner_over(plain, places)
    with pytest.raises(InvalidRequestError, match="the question without any passage takes about 18 ms"):
        await planner.plan(timed(14))  # 16, and 2 for the instruction block
    given = timed(100)
    for passage in given.passages:
        passage.document_id = ""
    assert not any(read(await planner.plan(given)))
    await settle()
    assert not places.warmed


async def test_the_time_that_is_expected_counts_where_blocks_are(plain: Bundle) -> None:
    for elsewhere, fetch in (({}, 2.0), ({0: "disk"}, 20.0), ({0: "encoded"}, None)):
        planner = planner_over(plain, Places(elsewhere))
        plan = await planner.plan(timed(PLENTY))
        if fetch is None:
            fetch = 800.0 + 10.0 * len(plan.passages[0].token_ids)
        before = len(plan.instruction_token_ids)
        assert plan.expected_ms == pytest.approx(5.0 + fetch + 10.0 + 0.5 * (before + slots(plan)))
        assert (await planner.plan(request())).expected_ms == 0.0


async def test_no_plan_is_expected_later_than_it_may_be_and_a_margin_is_left_free(plain: Bundle) -> None:
    planner = planner_over(plain, Places({0: "disk", 2: "encoded"}))
    for milliseconds in (20, 25, 40, 60, 100, 700, 900, 1200, 2000):
        plan = await planner.plan(timed(milliseconds))
        assert plan.expected_ms <= milliseconds
        margin = min(milliseconds / 2, milliseconds - 20)
        early = await planner.plan(timed(milliseconds, margin_ms=margin))
        assert early.expected_ms <= milliseconds - margin or not any(read(early))
    assert not any(read(await planner.plan(timed(21, margin_ms=10.0))))  # never refused for it


async def test_turns_that_are_not_encoded_take_their_time_too(plain: Bundle) -> None:
    turns = [Turn(question="where is it", answer="in the land")]
    warm = await planner_over(plain, Places(before=("store", "store"))).plan(timed(PLENTY, turns=turns))
    cold = await planner_over(plain, Places(before=("store", "encoded"))).plan(timed(PLENTY, turns=turns))
    [turn] = cold.turns
    assert cold.expected_ms - warm.expected_ms == pytest.approx(800.0 + 10.0 * len(turn.token_ids) - 2.0)
    with pytest.raises(InvalidRequestError, match="without any passage takes about"):
        await planner_over(plain, Places(before=("store", "encoded"))).plan(timed(400, turns=turns))


async def test_a_bound_on_tokens_does_not_wait_for_what_it_leaves_out(plain: Bundle) -> None:
    places = Places({1: "encoded"})
    first = len((await planner_over(plain, Places()).plan(request())).passages[0].token_ids)
    plan = await planner_over(plain, places).plan(timed(PLENTY, max_context_tokens=first))
    await settle()
    assert read(plan) == [True, False, False, False]
    assert plan.expected_ms < 800
    assert [block.document_id for block in places.warmed] == ["d1"]


async def test_sentences_of_a_block_that_is_not_read_are_not_waited_for(plain: Bundle) -> None:
    none = await planner_over(plain, Places({0: "encoded"})).plan(timed(60, policy="sentences"))
    assert not read(none)[0] and any(read(none))
    assert none.expected_ms <= 60
    some = await planner_over(plain, Places({3: "encoded"})).plan(timed(900, policy="sentences"))
    assert some.expected_ms <= (100 if not read(some)[3] else 900)


async def test_chunks_are_chosen_among_the_passages_that_are_there(planner: Planner, bundle: Bundle) -> None:
    places = Places({0: "encoded"})
    plan = await planner_over(bundle, places, planner).plan(timed(60))
    assert not plan.passages[0].in_prompt and plan.passages[1].in_prompt
    assert plan.expected_ms <= 60
    assert [passage.passage_id for passage in plan.passages] == [f"p{place}" for place in range(len(TEXTS))]
    await settle()
    assert [(block.document_id, str(block.form)) for block in places.warmed] == [("d0", "full"), ("d0", "compressed-4")]


async def test_policies_hear_of_the_retrieved_places(
    planner: Planner, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planner.mixer is not None
    heard: list[list[int]] = []
    rate = planner.mixer._rater.rate

    def listening(*arguments: object) -> object:
        heard.append(list(arguments[-1]))  # type: ignore[call-overload]
        return rate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(planner.mixer._rater, "rate", listening)
    await planner_over(bundle, Places({0: "encoded"}), planner).plan(timed(60, policy="query"))
    assert heard == [[1, 2, 3]]


async def test_a_plan_asks_once(plain: Bundle) -> None:
    places = Places({0: "encoded"})
    plan = await planner_over(plain, places).plan(timed(60, policy="sentences"))
    [asked] = places.asked
    assert (asked.context.tenant, asked.context.traceparent) == ("t", "trace")
    assert [list(block.token_ids) for block in asked.blocks] == [
        list(plan.instruction_token_ids),
        *(list(passage.token_ids) for passage in plan.passages),
    ]


async def test_forms_that_may_be_read_are_asked_for(planner: Planner, bundle: Bundle) -> None:
    places = Places()
    plan = await planner_over(bundle, places, planner).plan(timed(60))
    [asked] = places.asked
    assert [bool(block.forms) for block in asked.blocks[1:]] == [False, True] * len(plan.passages)
    assert [len(block.forms) for block in asked.blocks[2::2]] == [len(passage.chunks) for passage in plan.passages]
    assert {block.chunk_tokens for block in asked.blocks[2::2]} == {CHUNK}


async def test_without_a_measured_prefill_the_plan_is_refused(plain: Bundle) -> None:
    places = Places()
    places.said.measured_prefills = 0
    with pytest.raises(UnavailableError, match="without max_ttft_ms"):
        await planner_over(plain, places).plan(timed(400))


async def test_blocks_that_cannot_be_brought_into_memory_are_left(
    plain: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    places = Places({0: "encoded"})
    places.error = UnavailableError("shard: gone")
    await planner_over(plain, places).plan(timed(400))
    await settle()
    assert "blocks that came too late were not brought into memory: shard: gone" in caplog.text


async def test_what_goes_on_after_a_request_has_a_context_of_its_own(plain: Bundle) -> None:
    request_of = contextvars.ContextVar("request", default="")
    heard: list[str] = []

    class Listening(Places):
        async def warm(self, blocks: Sequence[BlockRequest], pin: bool) -> WarmOutcome:
            heard.append(request_of.get())
            return WarmOutcome()

    request_of.set("this one")
    await planner_over(plain, Listening({0: "encoded"})).plan(timed(400))
    await settle()
    assert heard == [""]
