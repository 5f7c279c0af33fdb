"""Plans for a time know where blocks are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from blockrag.compressor import timely
from blockrag.compressor.decoder_costs import DecoderCosts
from blockrag.compressor.plans import Planner
from blockrag.compressor.timely import Timely
from blockrag.errors import InvalidRequestError, UnavailableError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import Tier, WarmOutcome
from blockrag.modeling.bundle import Bundle
from blockrag.types import BlockRequest
from blockrag.v1.common_pb2 import CHUNK_FORM_DROPPED, Compression
from blockrag.v1.compressor_pb2 import PlanRequest
from blockrag.v1.decoder_pb2 import FetchCost, GetDecoderStatusResponse
from tests.unit.compressor.planning import TEXTS, decoder_status, make_planner, request, slots
from tests.unit.kv_cache.parts import settle

PLENTY = 10_000.0


async def status() -> GetDecoderStatusResponse:
    """10 ms and half a millisecond a slot; from the store 2 ms, from disk 20, a thousand for encoding."""
    fetches = [
        FetchCost(tier="store", base_ms=2.0),
        FetchCost(tier="disk", base_ms=20.0),
        FetchCost(tier="encoded", base_ms=800.0, slot_ms=10.0),
    ]
    answer = GetDecoderStatusResponse(fetches=fetches)
    answer.MergeFrom(await decoder_status())
    return answer


@dataclass
class Places:
    """The cache: every block is in the store but those that are ``elsewhere``, by their place in the request."""

    elsewhere: dict[int, Tier] = field(default_factory=dict)
    error: Exception | None = None
    silent: bool = False
    warmed: list[BlockRequest] = field(default_factory=list)

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        if self.error is not None:
            raise self.error
        if self.silent:
            await asyncio.Event().wait()
        return [self.elsewhere.get(place, "store") for place in range(len(keys))]

    async def warm(self, blocks: Sequence[BlockRequest], pin: bool) -> WarmOutcome:
        if self.error is not None:
            raise self.error
        assert not pin
        self.warmed += blocks
        return WarmOutcome()


def planner_over(bundle: Bundle, places: Places, like: Planner | None = None) -> Planner:
    costs = DecoderCosts(status)
    planner = make_planner(bundle, like.mixer if like else None, costs)
    planner.timely = Timely(costs, places, KeyMaker(bundle.fingerprint, b"secret"))
    return planner


def timed(milliseconds: float, spent_ms: float = 5.0, policy: str = "retrieval") -> PlanRequest:
    return request(Compression(max_ttft_ms=milliseconds, policy=policy), spent_ms=spent_ms)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timely, "_LONGEST_PAUSE_S", 0.0)


async def test_a_passage_that_must_be_encoded_is_left_out_where_there_is_no_time_for_it(plain: Bundle) -> None:
    places = Places({1: "encoded"})
    planner = planner_over(plain, places)
    plan = await planner.plan(timed(400))
    assert [passage.in_prompt for passage in plan.passages] == [True, False, True, True]
    left = plan.passages[1]
    assert "not encoded yet" in left.dropped_reason
    assert {chunk.form for chunk in left.chunks} == {CHUNK_FORM_DROPPED}
    assert (left.passage_id, left.document_id) == ("p1", "d1")
    all_of_it = await planner.plan(timed(PLENTY))
    assert all(passage.in_prompt for passage in all_of_it.passages)
    assert [passage.token_ids for passage in plan.passages] == [passage.token_ids for passage in all_of_it.passages]


async def test_it_is_encoded_afterwards_for_the_next_question(plain: Bundle) -> None:
    places = Places({1: "encoded", 2: "encoded", 3: "disk"})
    planner = planner_over(plain, places)
    plan = await planner.plan(timed(400))
    await settle()
    assert [block.document_id for block in places.warmed] == ["d1", "d2"]
    assert [list(block.token_ids) for block in places.warmed] == [
        list(passage.token_ids) for passage in plan.passages[1:3]
    ]
    assert {(block.tenant, block.collection) for block in places.warmed} == {("t", "c")}
    places.warmed.clear()
    await planner.plan(timed(PLENTY))  # these are encoded for the answer itself
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


async def test_no_plan_is_expected_later_than_it_may_be(plain: Bundle) -> None:
    planner = planner_over(plain, Places({0: "disk", 2: "encoded"}))
    for milliseconds in (18, 25, 40, 60, 100, 700, 900, 1200, 2000):
        plan = await planner.plan(timed(milliseconds))
        assert plan.expected_ms <= milliseconds
    with pytest.raises(InvalidRequestError, match="the question without any passage takes about 16 ms"):
        await planner.plan(timed(14))


async def test_chunks_are_chosen_among_the_passages_that_are_there(planner: Planner, bundle: Bundle) -> None:
    places = Places({0: "encoded"})
    of_those_here = await planner_over(bundle, places, planner).plan(timed(60))
    assert not of_those_here.passages[0].in_prompt
    assert of_those_here.passages[1].in_prompt
    assert of_those_here.expected_ms <= 60
    assert [passage.passage_id for passage in of_those_here.passages] == [f"p{place}" for place in range(len(TEXTS))]
    await settle()
    assert [block.document_id for block in places.warmed] == ["d0"]


async def test_sentences_of_a_passage_that_is_not_there_are_not_read(plain: Bundle) -> None:
    plan = await planner_over(plain, Places({0: "encoded"})).plan(timed(60, policy="sentences"))
    assert not plan.passages[0].in_prompt
    assert any(passage.in_prompt for passage in plan.passages)
    assert plan.expected_ms <= 60


@pytest.mark.parametrize("error", [None, UnavailableError("shard: gone")])
async def test_a_cache_that_does_not_answer_is_taken_to_hold_everything(plain: Bundle, error: Exception | None) -> None:
    places = Places({0: "encoded"}, error, silent=error is None)
    plan = await planner_over(plain, places).plan(timed(400))
    assert all(passage.in_prompt for passage in plan.passages)


async def test_blocks_that_cannot_be_encoded_afterwards_are_left(
    plain: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    places = Places({0: "encoded"})
    planner = planner_over(plain, places)
    await planner.plan(timed(400))
    places.error = UnavailableError("shard: gone")
    await settle()
    assert "blocks that came too late were not encoded: shard: gone" in caplog.text
