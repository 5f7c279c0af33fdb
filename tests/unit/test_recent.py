from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.recent import Recent


def test_nothing_is_known_before_the_first_value() -> None:
    assert Recent().values() == []
    assert Recent().line() == (0.0, 0.0, 0)
    assert Recent().line().at(100) == 0.0


@given(
    st.floats(0.1, 100),
    st.floats(0.001, 1),
    st.lists(st.integers(1, 8000), min_size=2, max_size=200, unique=True),
)
def test_a_line_is_found(base: float, slope: float, sizes: list[int]) -> None:
    recent = Recent()
    for size in sizes:
        recent.record(base + slope * size, size)
    line = recent.line()
    assert line.slope == pytest.approx(slope, rel=1e-6)
    assert line.base == pytest.approx(base, rel=1e-6, abs=1e-6)
    assert line.at(100) == pytest.approx(base + 100 * slope, rel=1e-6)


def test_values_of_a_busy_moment_change_little() -> None:
    recent = Recent()
    for place in range(40):
        size = 100 * (1 + place % 10)
        recent.record(5 + 0.01 * size + (300 if place % 4 == 3 else 0), size)
    line = recent.line()
    assert line.slope == pytest.approx(0.01, rel=0.2)
    assert line.base == pytest.approx(5, rel=0.2)


def test_many_of_one_size_do_not_push_out_the_others() -> None:
    recent = Recent()
    for size in (64, 256, 1024):
        recent.record(2 + 0.1 * size, size)
    for _ in range(1000):
        recent.record(32.0, 300)
    assert recent.line().slope == pytest.approx(0.1)
    assert recent.line().samples == 2 + 8


def test_one_size_says_nothing_of_others_and_lines_never_fall() -> None:
    recent = Recent()
    recent.record(7.0, 100)
    recent.record(9.0, 100)
    assert (recent.line().base, recent.line().slope) == (8.0, 0.0)
    recent.record(3.0, 1000)
    assert recent.line().slope == 0.0


def test_a_value_counts_as_long_as_it_is_fresh() -> None:
    now = 100.0
    recent = Recent(fresh_s=60.0, clock=lambda: now)
    recent.record(2500.0, 10)
    now += 59
    assert recent.line().base == 2500.0
    now += 2
    assert (recent.line().samples, recent.values()) == (0, [])
    recent.record(20.0, 10)
    assert recent.line().base == 20.0


def test_what_a_busy_machine_took_says_nothing_of_a_quiet_one() -> None:
    now = 0.0
    recent = Recent(clock=lambda: now)
    for size in (64, 256, 1024) * 3:  # at the start, beside other work
        recent.record(70 + 0.05 * size, size)
    now += 600
    for size in (4000, 5000, 6000, 5500, 4500, 5800, 4100, 5200):
        recent.record(26 + 0.01 * size, size)
    assert recent.line().base == pytest.approx(26, abs=15)
    for size in (500, 700) * 4:
        recent.record(26 + 0.01 * size, size)
    assert recent.line().slope == pytest.approx(0.01, rel=0.5)
    assert recent.line().base == pytest.approx(26, abs=3)


def test_the_latest_of_each_power_of_two_are_kept() -> None:
    recent = Recent(kept=2)
    for value in (1.0, 2.0, 3.0):
        recent.record(value)
    recent.record(9.0, 5)
    assert recent.values() == [2.0, 3.0, 9.0]
