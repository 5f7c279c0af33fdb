from __future__ import annotations

from blockrag.budget import PrefillCost
from blockrag.compressor.mixing import PolicyTimes


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
