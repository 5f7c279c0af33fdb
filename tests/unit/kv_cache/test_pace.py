from __future__ import annotations

from blockrag.kv_cache.pace import LoadOrEncode, Pace


def test_a_pace_follows_what_is_measured() -> None:
    pace = Pace()
    assert pace.expected(10) == 0
    pace.measured(2.0, 4)
    assert pace.expected(10) == 5
    for _ in range(50):
        pace.measured(1.0, 10)
    assert 1 <= pace.expected(10) < 1.001


def test_what_was_slower_than_encoding_is_not_loaded_but_tried_again() -> None:
    choice = LoadOrEncode()
    assert choice.load(10, 0.001), "nothing was measured yet"
    choice.reading.measured(1.0, 10)
    assert choice.load(10, 1.0)
    assert [choice.load(10, 0.9) for _ in range(32)].count(True) == 2
    assert choice.slower == 30
    choice.reading.measured(0.0, 10)
    choice.reading.measured(0.0, 10)
    assert choice.load(10, 0.9)
