from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.prefill_cost import PrefillMeter, measure_prefills
from blockrag.modeling.model import SlotModel
from tests.models import make_tiny_model


def test_nothing_is_known_before_the_first_prefill() -> None:
    fit = PrefillMeter().fit()
    assert (fit.base_ms, fit.slot_ms, fit.prefills) == (0.0, 0.0, 0)


@given(
    st.floats(0.1, 100),
    st.floats(0.001, 1),
    st.lists(st.integers(1, 8000), min_size=2, max_size=200, unique=True),
)
def test_a_line_is_found(base: float, slope: float, sizes: list[int]) -> None:
    meter = PrefillMeter()
    for slots in sizes:
        meter.record(slots, base + slope * slots)
    fit = meter.fit()
    assert fit.slot_ms == pytest.approx(slope, rel=1e-6)
    assert fit.base_ms == pytest.approx(base, rel=1e-6, abs=1e-6)


def test_prefills_that_had_to_share_the_machine_change_little() -> None:
    meter = PrefillMeter()
    for place in range(40):
        slots = 100 * (1 + place % 10)
        meter.record(slots, 5 + 0.01 * slots + (300 if place % 4 == 3 else 0))
    fit = meter.fit()
    assert fit.slot_ms == pytest.approx(0.01, rel=0.2)
    assert fit.base_ms == pytest.approx(5, rel=0.2)


def test_many_prompts_of_one_size_do_not_push_out_the_others() -> None:
    meter = PrefillMeter()
    for slots in (64, 256, 1024):
        meter.record(slots, 2 + 0.1 * slots)
    for _ in range(1000):
        meter.record(300, 32.0)
    assert meter.fit().slot_ms == pytest.approx(0.1)
    assert meter.fit().prefills == 2 + 8


def test_one_size_says_nothing_about_slots_and_times_never_fall() -> None:
    meter = PrefillMeter()
    meter.record(100, 7.0)
    meter.record(100, 9.0)
    assert (meter.fit().base_ms, meter.fit().slot_ms) == (8.0, 0.0)
    meter.record(1000, 3.0)
    assert meter.fit().slot_ms == 0.0


def test_a_model_is_measured_before_the_first_question() -> None:
    meter = PrefillMeter()
    measure_prefills(SlotModel.from_pretrained_model(make_tiny_model()), meter)
    fit = meter.fit()
    assert fit.prefills == 9
    assert fit.base_ms > 0
    assert fit.slot_ms >= 0


def test_a_model_of_few_positions_is_measured_as_far_as_they_go() -> None:
    meter = PrefillMeter()
    measure_prefills(SlotModel.from_pretrained_model(make_tiny_model(max_position_embeddings=96)), meter)
    assert meter.fit().prefills == 3
