from __future__ import annotations

import pytest

from blockrag.decoder.costs import CostMeters, measure_costs
from blockrag.modeling.model import SlotModel
from tests.models import make_tiny_model


def test_a_model_is_measured_before_the_first_question() -> None:
    meters = CostMeters()
    measure_costs(SlotModel.from_pretrained_model(make_tiny_model()), meters)
    prefill, encoded = meters.prefill.line(), meters.fetches["encoded"].line()
    assert (prefill.samples, encoded.samples) == (9, 2)
    assert prefill.base > 0
    assert prefill.slope >= 0
    assert encoded.base + encoded.slope > 0


def test_a_model_of_few_positions_is_measured_as_far_as_they_go() -> None:
    meters = CostMeters()
    measure_costs(SlotModel.from_pretrained_model(make_tiny_model(max_position_embeddings=96)), meters)
    assert meters.prefill.line().samples == 3


def test_what_a_volume_took_is_no_time_of_the_disk() -> None:
    meters = CostMeters()
    meters.record_fetch({"disk": 100}, 4.0)
    for tokens in ({"volume": 100}, {"volume": 50, "disk": 50}, {"volume": 100, "encoded": 10}):
        meters.record_fetch(tokens, 900.0)
    assert meters.fetches["disk"].values() == [4.0]
    assert meters.fetches["encoded"].values() == []


def test_a_fetch_is_what_the_slowest_place_took() -> None:
    meters = CostMeters()
    meters.record_fetch({"l1": 3, "encoded": 10, "store": 5}, 50.0)
    meters.record_fetch({"store": 8, "disk": 6}, 4.0)
    meters.record_fetch({"l1": 18}, 0.1)
    meters.record_fetch({}, 0.0)
    assert {tier: meter.line().samples for tier, meter in meters.fetches.items()} == {
        "encoded": 1,
        "disk": 1,
        "store": 0,
    }
    meters.record_fetch({"encoded": 3, "l1": 15}, 15.0)
    assert meters.fetches["encoded"].line().slope == pytest.approx(5.0)
