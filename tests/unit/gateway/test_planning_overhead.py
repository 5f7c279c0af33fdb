import pytest

from blockrag.gateway.planning import Overhead


def test_the_median_of_what_is_neither_retrieval_nor_the_decoders() -> None:
    overhead = Overhead()
    assert overhead.milliseconds == 0.0
    for other in (4.0, 5.0, 300.0):
        overhead.record(
            24.0 + other, {"retrieve": 8.0, "plan": 3.0, "compose": 2.0, "prefill": 10.0, "total": 999.0}, 4.0
        )
    assert overhead.milliseconds == 5.0


def test_old_answers_and_those_without_a_token_do_not_count() -> None:
    overhead = Overhead()
    for _ in range(100):
        overhead.record(1000.0, {})
    for _ in range(32):
        overhead.record(7.0, {"prefill": 9.0})
        overhead.record(0.0, {})
    assert overhead.milliseconds == 0.0


def test_answers_that_the_compressor_planned_count_where_there_are_any() -> None:
    overhead = Overhead()
    overhead.record(5.0, {})
    assert overhead.milliseconds == 5.0
    overhead.record(9.0, {}, by_compressor=True)
    overhead.record(5.0, {})
    assert overhead.milliseconds == 9.0


def test_a_busy_time_is_forgotten_though_nothing_is_answered() -> None:
    now = 0.0
    overhead = Overhead(lambda: now)
    overhead.record(500.0, {}, by_compressor=True)
    now = 59.0
    overhead.record(5.0, {})
    assert overhead.milliseconds == 500.0
    now = 61.0
    assert overhead.milliseconds == 5.0
    now = 200.0
    assert overhead.milliseconds == 0.0


def test_plans_for_a_time_leave_free_what_made_the_latest_late() -> None:
    now = 100.0
    overhead = Overhead(lambda: now)
    for _ in range(7):
        overhead.record_expected(165.0, 100.0)
    assert overhead.margin_ms(100.0) == 0.0  # too few to say
    overhead.record_expected(165.0, 100.0)
    assert overhead.margin_ms(300.0) == pytest.approx(100.0)  # 1.5 times what is planned is 1.65 times what is late
    for _ in range(63):
        overhead.record_expected(109.0, 100.0)
    assert overhead.margin_ms(300.0) == 0.0  # a tenth late is in time, and one of 64 may be later
    overhead.record_expected(0.0, 100.0)  # without a first token
    now += 61
    for _ in range(7):
        overhead.record_expected(165.0, 100.0)
    assert overhead.margin_ms(300.0) == 0.0


@pytest.mark.parametrize("answers", [8, 15, 19, 20, 32])
def test_a_single_late_answer_makes_no_margin_and_none_is_above_half(answers: int) -> None:
    overhead = Overhead()
    for _ in range(answers - 1):
        overhead.record_expected(100.0, 100.0)
    overhead.record_expected(5000.0, 100.0)
    assert overhead.margin_ms(300.0) == 0.0
    for _ in range(64):
        overhead.record_expected(5000.0, 100.0)
    assert overhead.margin_ms(300.0) == 150.0
