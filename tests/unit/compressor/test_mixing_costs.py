from __future__ import annotations

import asyncio

import pytest

from blockrag.budget import PrefillCost
from blockrag.compressor.decoder_costs import FRESH_S, DecoderCosts
from blockrag.compressor.mixing import PolicyTimes
from blockrag.errors import UnavailableError
from blockrag.v1.decoder_pb2 import FetchCost, GetDecoderStatusResponse
from tests.unit.kv_cache.parts import settle


class Decoder:
    def __init__(self) -> None:
        self.asked = 0
        self.answer: GetDecoderStatusResponse | Exception = GetDecoderStatusResponse(
            prefill_base_ms=5.0, prefill_slot_ms=0.01, measured_prefills=9
        )

    async def __call__(self) -> GetDecoderStatusResponse:
        self.asked += 1
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_the_decoder_is_asked_once_for_many_plans() -> None:
    decoder = Decoder()
    costs = DecoderCosts(decoder, clock=Clock())
    found = await asyncio.gather(*(costs.current() for _ in range(20)))
    assert set(found) == {PrefillCost(5.0, 0.01)}
    assert decoder.asked == 1


async def test_an_old_cost_serves_while_it_is_asked_for_again() -> None:
    decoder, clock = Decoder(), Clock()
    costs = DecoderCosts(decoder, clock=clock)
    await costs.current()
    decoder.answer = GetDecoderStatusResponse(prefill_base_ms=7.0, prefill_slot_ms=0.02, measured_prefills=12)
    clock.now += FRESH_S + 0.1
    assert await costs.current() == PrefillCost(5.0, 0.01)
    await settle()
    assert await costs.current() == PrefillCost(7.0, 0.02)
    assert decoder.asked == 2


async def test_what_fetching_takes_is_told_too() -> None:
    decoder = Decoder()
    decoder.answer = GetDecoderStatusResponse(
        prefill_base_ms=5.0,
        prefill_slot_ms=0.01,
        measured_prefills=9,
        fetches=[FetchCost(tier="disk", base_ms=3.0, slot_ms=0.5)],
    )
    assert (await DecoderCosts(decoder).current()).fetch_ms({"disk": 10, "store": 10}) == 8.0


async def test_a_decoder_that_is_away_leaves_the_last_cost() -> None:
    decoder, clock = Decoder(), Clock()
    costs = DecoderCosts(decoder, clock=clock)
    await costs.current()
    decoder.answer = UnavailableError("decoder: gone")
    clock.now += 60
    assert (await costs.current()).base_ms == 5.0
    await settle()
    assert (await costs.current()).base_ms == 5.0


@pytest.mark.parametrize("answer", [UnavailableError("decoder: gone"), GetDecoderStatusResponse()])
async def test_without_any_cost_the_plan_is_refused(answer: GetDecoderStatusResponse | Exception) -> None:
    decoder = Decoder()
    decoder.answer = answer
    with pytest.raises(UnavailableError, match="without max_ttft_ms"):
        await DecoderCosts(decoder).current()


def test_slots_for_a_time() -> None:
    assert PrefillCost(5.0, 0.5).slots(10.0) == 10
    assert PrefillCost(5.0, 0.5).slots(5.0) == 0
    assert PrefillCost(5.0, 0.5).slots(1.0) == 0
    assert PrefillCost(5.0, 0.0).slots(6.0) > 10**6


def test_the_policys_time_is_expected_by_the_number_of_chunks() -> None:
    times = PolicyTimes()
    assert times.expect(100) == 0.0
    for milliseconds in (3.0, 4.0, 90.0):
        times.record(100, milliseconds)
    times.record(1000, 50.0)
    assert times.expect(120) == 4.0
    assert times.expect(900) == 50.0
    assert times.expect(2000) == 100.0
    assert times.expect(40) == 2.0
