from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.costs import CostMeter, CostMeters, measure_costs
from blockrag.modeling.model import SlotModel
from tests.models import make_tiny_model


def test_nothing_is_known_before_the_first_prefill() -> None:
    fit = CostMeter().fit()
    assert (fit.base_ms, fit.slot_ms, fit.samples) == (0.0, 0.0, 0)


@given(
    st.floats(0.1, 100),
    st.floats(0.001, 1),
    st.lists(st.integers(1, 8000), min_size=2, max_size=200, unique=True),
)
def test_a_line_is_found(base: float, slope: float, sizes: list[int]) -> None:
    meter = CostMeter()
    for slots in sizes:
        meter.record(slots, base + slope * slots)
    fit = meter.fit()
    assert fit.slot_ms == pytest.approx(slope, rel=1e-6)
    assert fit.base_ms == pytest.approx(base, rel=1e-6, abs=1e-6)


def test_prefills_that_had_to_share_the_machine_change_little() -> None:
    meter = CostMeter()
    for place in range(40):
        slots = 100 * (1 + place % 10)
        meter.record(slots, 5 + 0.01 * slots + (300 if place % 4 == 3 else 0))
    fit = meter.fit()
    assert fit.slot_ms == pytest.approx(0.01, rel=0.2)
    assert fit.base_ms == pytest.approx(5, rel=0.2)


def test_many_prompts_of_one_size_do_not_push_out_the_others() -> None:
    meter = CostMeter()
    for slots in (64, 256, 1024):
        meter.record(slots, 2 + 0.1 * slots)
    for _ in range(1000):
        meter.record(300, 32.0)
    assert meter.fit().slot_ms == pytest.approx(0.1)
    assert meter.fit().samples == 2 + 8


def test_one_size_says_nothing_about_slots_and_times_never_fall() -> None:
    meter = CostMeter()
    meter.record(100, 7.0)
    meter.record(100, 9.0)
    assert (meter.fit().base_ms, meter.fit().slot_ms) == (8.0, 0.0)
    meter.record(1000, 3.0)
    assert meter.fit().slot_ms == 0.0


def test_a_model_is_measured_before_the_first_question() -> None:
    meters = CostMeters()
    measure_costs(SlotModel.from_pretrained_model(make_tiny_model()), meters)
    prefill, encoded = meters.prefill.fit(), meters.fetches["encoded"].fit()
    assert (prefill.samples, encoded.samples) == (9, 2)
    assert prefill.base_ms > 0
    assert prefill.slot_ms >= 0
    assert encoded.base_ms + encoded.slot_ms > 0


def test_a_model_of_few_positions_is_measured_as_far_as_they_go() -> None:
    meters = CostMeters()
    measure_costs(SlotModel.from_pretrained_model(make_tiny_model(max_position_embeddings=96)), meters)
    assert meters.prefill.fit().samples == 3


def test_a_fetch_is_what_the_slowest_place_took() -> None:
    meters = CostMeters()
    meters.record_fetch({"l1": 3, "encoded": 10, "store": 5}, 50.0)
    meters.record_fetch({"store": 8, "disk": 6}, 4.0)
    meters.record_fetch({"l1": 18}, 0.1)
    meters.record_fetch({}, 0.0)
    assert {tier: meter.fit().samples for tier, meter in meters.fetches.items()} == {
        "encoded": 1,
        "disk": 1,
        "store": 0,
    }
    meters.record_fetch({"encoded": 3, "l1": 15}, 15.0)
    assert meters.fetches["encoded"].fit().slot_ms == pytest.approx(5.0)


def test_a_time_counts_as_long_as_it_is_fresh() -> None:
    now = 100.0
    meter = CostMeter(60.0, lambda: now)
    meter.record(10, 2500.0)
    now += 59
    assert meter.fit().base_ms == 2500.0
    now += 2
    assert meter.fit().samples == 0
    meter.record(10, 20.0)
    assert meter.fit().base_ms == 20.0


def test_what_a_busy_machine_took_says_nothing_of_a_quiet_one() -> None:
    now = 0.0
    meter = CostMeter(clock=lambda: now)
    for slots in (64, 256, 1024) * 3:  # at the start, beside other work
        meter.record(slots, 70 + 0.05 * slots)
    now += 600
    for slots in (4000, 5000, 6000, 5500, 4500, 5800, 4100, 5200):
        meter.record(slots, 26 + 0.01 * slots)
    assert meter.fit().base_ms == pytest.approx(26, abs=15)
    for slots in (500, 700) * 4:
        meter.record(slots, 26 + 0.01 * slots)
    assert meter.fit().slot_ms == pytest.approx(0.01, rel=0.5)
    assert meter.fit().base_ms == pytest.approx(26, abs=3)
