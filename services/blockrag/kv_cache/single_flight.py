"""One computation per key, however many ask for it at the same time."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from blockrag.errors import UnavailableError

T = TypeVar("T")


@dataclass
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0


class SingleFlight(Generic[T]):
    """Runs at most one computation per key at a time and gives its result, or its error, to all who wait.

    A waiter that is cancelled leaves the computation to the others; when the last one leaves, it is cancelled. Nothing
    is remembered once it ended. The computation runs in a context of its own: it belongs to all its waiters, so the
    cancellation that Serve ties to the first one's request must not reach it.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    async def run(self, key: str, start: Callable[[], Awaitable[T]]) -> T:
        """Joins the key's computation, or starts it."""
        flight = self._flights.get(key)
        if flight is None:
            task = asyncio.get_running_loop().create_task(self._compute(key, start), context=contextvars.Context())
            flight = self._flights[key] = _Flight(task)
            task.add_done_callback(_retrieve_error)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if flight.task.cancelled() and not (waiter and waiter.cancelling()):
                # Cancelled from below, not by our caller: that is a failure, not a cancellation, to this waiter.
                raise UnavailableError(f"work on block {key} was cancelled") from None
            raise
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._leave(key, flight)
                flight.task.cancel()

    async def _compute(self, key: str, start: Callable[[], Awaitable[T]]) -> T:
        flight = self._flights[key]
        try:
            return await start()
        finally:
            self._leave(key, flight)

    def _leave(self, key: str, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


def _retrieve_error(task: asyncio.Task[T]) -> None:
    """Keeps asyncio from reporting an error that no waiter was left to see."""
    if not task.cancelled():
        task.exception()
