"""Refusing at once instead of queueing."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.errors import OverloadedError
from blockrag.gateway.admission import Admission, Closed, Quotas, Rate
from blockrag.settings import GatewaySettings
from blockrag.tenants import NO_LIMITS


def test_one_too_many_is_refused_with_a_hint_and_places_come_back() -> None:
    admission = Admission("answers are in progress", 2)
    with admission.slot(), admission.slot():
        assert admission.running == 2
        with pytest.raises(OverloadedError, match="2 answers are in progress") as refused, admission.slot():
            pass
        assert 50 <= refused.value.retry_after_ms <= 5_000
        assert admission.running == 2
    assert admission.running == 0


def test_a_failing_request_gives_its_place_back() -> None:
    admission = Admission("answers are in progress", 1)
    with contextlib.suppress(ValueError), admission.slot():
        raise ValueError
    with admission.slot():
        assert admission.running == 1


def test_the_hint_follows_how_long_requests_take() -> None:
    admission = Admission("answers are in progress", 1)
    for _ in range(200):
        with admission.slot():
            pass
    with admission.slot(), pytest.raises(OverloadedError) as refused, admission.slot():
        pass
    assert refused.value.retry_after_ms == 50


def test_one_tenant_does_not_keep_the_others_out() -> None:
    admission = Admission("documents are being received", 4, several_tenants=True)
    with admission.slot("acme"), admission.slot("acme"):
        with pytest.raises(OverloadedError, match="2 documents are being received for acme"), admission.slot("acme"):
            pass
        with admission.slot("umbrella"):
            assert admission.running == 3
    with admission.slot("acme"):
        assert admission.running == 1


def test_one_place_is_enough_for_each_of_many_tenants() -> None:
    admission = Admission("warmings are under way", 1, several_tenants=True)
    with admission.slot("acme"), pytest.raises(OverloadedError), admission.slot("umbrella"):
        pass
    with admission.slot("umbrella"):
        assert admission.of("umbrella") == 1


def test_a_tenant_s_own_limit_is_named_and_may_change() -> None:
    limits = {"acme": 1}
    admission = Admission("answers are in progress", 64, limits.get)
    with admission.slot("acme"):
        with (
            pytest.raises(OverloadedError, match=r"1 answers are in progress for acme, its limit here is 1"),
            admission.slot("acme"),
        ):
            pass
        with admission.slot("umbrella"), admission.slot("umbrella"):
            assert admission.of("umbrella") == 2
        limits["acme"] = 2
        with admission.slot("acme"):
            assert admission.of("acme") == 2


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_refuses_with_the_time_until_something_is_left() -> None:
    clock = Clock()
    rate = Rate("questions_a_minute", {"acme": 6}.get, clock)
    for _ in range(6):
        rate.check("acme")
        rate.charge("acme", 1)
    with pytest.raises(OverloadedError, match="acme has used its 6 questions_a_minute") as refused:
        rate.check("acme")
    assert refused.value.retry_after_ms == 10_000
    clock.now += 9.9
    with pytest.raises(OverloadedError):
        rate.check("acme")
    clock.now += 0.2
    rate.check("acme")
    rate.check("umbrella")  # has no limit


def test_what_is_charged_beyond_the_limit_is_waited_off_and_nothing_is_saved_up() -> None:
    clock = Clock()
    rate = Rate("tokens_a_minute", {"acme": 600}.get, clock)
    rate.charge("acme", 1800)
    with pytest.raises(OverloadedError) as refused:
        rate.check("acme")
    assert 120_000 <= refused.value.retry_after_ms <= 120_200
    clock.now += refused.value.retry_after_ms / 1000
    rate.check("acme")
    clock.now += 3600
    assert rate.used("acme") == 0
    rate.charge("acme", 600)
    with pytest.raises(OverloadedError):
        rate.check("acme")


@given(
    limit=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=200),
)
def test_no_more_is_let_through_in_a_minute_than_the_limit_and_what_comes_back(
    limit: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    rate = Rate("questions_a_minute", lambda _: limit, clock)
    let_through: list[float] = []
    for pause, asked in steps:
        clock.now += pause
        for _ in range(asked):
            with contextlib.suppress(OverloadedError):
                rate.check("acme")
                rate.charge("acme", 1)
                let_through.append(clock.now)
    for start in let_through:
        assert sum(start <= at < start + 60 for at in let_through) <= 2 * limit


def test_what_the_decoder_refused_is_refused_here_for_a_part_of_its_hint() -> None:
    clock = Clock()
    closed = Closed(clock)
    closed.check("acme")
    closed.note("acme", OverloadedError("the decoder has 32 requests of acme waiting", 2000))
    closed.check("umbrella")
    clock.now += 0.2
    with pytest.raises(
        OverloadedError, match="the decoder has 32 requests of acme waiting; retry in 1800 ms"
    ) as refused:
        closed.check("acme")
    assert refused.value.retry_after_ms == 1800
    clock.now += 0.06
    closed.check("acme")


def test_a_question_that_the_decoder_refuses_closes_the_door_to_the_next_answers_and_not_to_searches() -> None:
    quotas = Quotas(GatewaySettings(), lambda _: NO_LIMITS)
    with pytest.raises(OverloadedError), quotas.answer("acme"):
        raise OverloadedError("the decoder has 64 requests waiting", 60_000)
    entered = []
    with pytest.raises(OverloadedError, match="64 requests waiting"), quotas.answer("acme"):
        entered.append("acme")
    with quotas.question("acme"), quotas.answer("umbrella"):
        entered.append("umbrella")
    assert entered == ["umbrella"]
    with pytest.raises(ValueError, match="of another kind"), quotas.answer("umbrella"):
        raise ValueError("of another kind")
    with quotas.answer("umbrella"):
        assert quotas.answers.running == 1
