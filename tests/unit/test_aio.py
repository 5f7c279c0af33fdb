from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence

import pytest

from blockrag.aio import SingleFlight, gather_or_cancel
from blockrag.errors import InvalidRequestError, UnavailableError


class Work:
    """Counts its starts and ends when told to."""

    def __init__(self) -> None:
        self.starts = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> str:
        self.starts += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return f"result {self.starts}"


async def settle() -> None:
    """Lets everything run that can run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_hundred_requests_are_one_computation() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    waiters = [asyncio.ensure_future(flights.run("k", work)) for _ in range(100)]
    await settle()
    assert "k" in flights
    work.go.set()
    assert set(await asyncio.gather(*waiters)) == {"result 1"}
    assert work.starts == 1
    assert len(flights) == 0


async def test_different_keys_do_not_wait_for_each_other() -> None:
    flights: SingleFlight[str] = SingleFlight()
    slow, fast = Work(), Work()
    fast.go.set()
    waiting = asyncio.ensure_future(flights.run("slow", slow))
    assert await flights.run("fast", fast) == "result 1"
    slow.go.set()
    await waiting


async def test_an_error_reaches_all_waiters_and_is_not_remembered() -> None:
    flights: SingleFlight[str] = SingleFlight()
    go = asyncio.Event()
    starts = 0

    async def fail() -> str:
        nonlocal starts
        starts += 1
        await go.wait()
        raise InvalidRequestError("token_ids", "no")

    waiters = [asyncio.ensure_future(flights.run("k", fail)) for _ in range(3)]
    await settle()
    go.set()
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [InvalidRequestError] * 3
    with pytest.raises(InvalidRequestError):
        await flights.run("k", fail)
    assert starts == 2


async def test_a_waiter_that_leaves_does_not_stop_the_others() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    first, second = (asyncio.ensure_future(flights.run("k", work)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    assert first.cancelled()
    work.go.set()
    assert await second == "result 1"
    assert work.cancelled == 0


async def test_work_stops_when_the_last_waiter_leaves_and_starts_anew_for_the_next() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    waiters = [asyncio.ensure_future(flights.run("k", work)) for _ in range(2)]
    await settle()
    for waiter in waiters:
        waiter.cancel()
    await settle()
    assert work.cancelled == 1
    assert len(flights) == 0
    work.go.set()
    assert await flights.run("k", work) == "result 2"


async def test_a_request_right_after_the_last_waiter_left_is_not_caught_by_its_cancellation() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    leaving = asyncio.ensure_future(flights.run("k", work))
    await settle()
    leaving.cancel()
    await asyncio.sleep(0)
    staying = asyncio.ensure_future(flights.run("k", work))
    await settle()
    work.go.set()
    assert (await staying).startswith("result")


async def test_work_that_is_cancelled_from_below_is_a_failure() -> None:
    flights: SingleFlight[str] = SingleFlight()

    async def cancelled() -> str:
        raise asyncio.CancelledError

    with pytest.raises(UnavailableError, match="cancelled"):
        await flights.run("k", cancelled)


async def test_work_does_not_run_in_the_context_of_a_waiter() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")
    variable.set("the first waiter's")
    flights: SingleFlight[str] = SingleFlight()

    async def read() -> str:
        return variable.get()

    assert await flights.run("k", read) == "nobody's"


async def test_several_keys_join_what_is_under_way_and_are_one_computation_otherwise() -> None:
    flights: SingleFlight[str] = SingleFlight()
    go = asyncio.Event()
    started: list[list[str]] = []

    async def work(keys: Sequence[str]) -> dict[str, str]:
        started.append(list(keys))
        await go.wait()
        return {key: f"{key} of {len(started)}" for key in keys}

    first = asyncio.ensure_future(flights.run_all(["a", "b", "a"], work))
    await settle()
    second = asyncio.ensure_future(flights.run_all(["c", "b", "d"], work))
    await settle()
    assert started == [["a", "b"], ["c", "d"]]
    first.cancel()
    await settle()
    go.set()
    assert list(await second) == ["c", "b", "d"]
    assert len(flights) == 0


async def test_a_forgotten_computation_is_left_to_those_who_wait() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    before = asyncio.ensure_future(flights.run("k", work))
    await settle()
    flights.forget("k")
    flights.forget("nobody's")
    after = asyncio.ensure_future(flights.run("k", work))
    await settle()
    assert work.starts == 2
    before.cancel()
    await settle()
    assert "k" in flights
    work.go.set()
    assert await after == "result 2"


async def test_gathering_raises_the_first_error_after_the_others_have_ended() -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waiting")

    async def fail() -> None:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        await gather_or_cancel([wait(), fail(), wait()])
    assert ended == ["waiting", "waiting"]
    assert await gather_or_cancel([]) == []
