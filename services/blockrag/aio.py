"""What asyncio leaves to its users: coroutines together, work that is no request's, one computation for all who ask."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from blockrag.errors import UnavailableError

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


async def gather_or_cancel(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first error is raised as it is, after the others were cancelled and have ended."""
    if not coroutines:
        return []
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def detached(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task in a context of its own: it goes on after the request that began it, whose deadline, span and cancellation
    (Serve ties one to the context) are none of it."""
    return asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())


def forwarded(method: Method) -> Method:
    """The method, of what an object stands for in another process: handed to the object's ``call`` by its name."""

    async def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return await self.call(method.__name__, *arguments, **named)

    return cast(Method, forward)


def failed(future: asyncio.Future[Any]) -> bool:
    """Whether a future that is done has no result; keeps asyncio from reporting an error that nobody is left to see."""
    return future.cancelled() or future.exception() is not None


@dataclass(eq=False)
class _Flight(Generic[T]):
    keys: Sequence[str]
    task: asyncio.Task[Mapping[str, T]]
    waiters: int = 0


class SingleFlight(Generic[T]):
    """Runs at most one computation per key at a time and gives its result, or its error, to all who wait.

    A computation is for one key or for several. A waiter that is cancelled leaves it to the others; when the last one
    leaves, it is cancelled. Nothing is remembered once it ended. It belongs to all its waiters, and so to
    no request (``detached``).
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    async def run(self, key: str, start: Callable[[], Awaitable[T]]) -> T:
        """Joins the key's computation, or starts it. Raises what it raises, ``UnavailableError`` if it was cancelled
        from below."""

        async def only(_: Sequence[str]) -> Mapping[str, T]:
            return {key: await start()}

        return (await self.run_all([key], only))[key]

    async def run_all(
        self, keys: Iterable[str], start: Callable[[Sequence[str]], Awaitable[Mapping[str, T]]]
    ) -> dict[str, T]:
        """Joins the computations of keys that have one, and starts one for all the others; errors as of ``run``.

        ``start`` gets the others' keys and gives each one's result.
        """
        distinct = list(dict.fromkeys(keys))
        flights = {key: self._flights[key] for key in distinct if key in self._flights}
        missing = [key for key in distinct if key not in flights]
        if missing:
            flight = self._launch(missing, start)
            flights.update((key, flight) for key in missing)
        involved = set(flights.values())
        for flight in involved:
            flight.waiters += 1
        try:
            results = {flight: await _landed(flight) for flight in involved}
        finally:
            for flight in involved:
                flight.waiters -= 1
                if not flight.waiters and not flight.task.done():
                    self._leave(flight)
                    flight.task.cancel()
        return {key: results[flights[key]][key] for key in distinct}

    def forget(self, key: str) -> None:
        """Leaves the key's computation to those who wait: whoever asks from now on starts another."""
        self._flights.pop(key, None)

    def _launch(self, keys: Sequence[str], start: Callable[[Sequence[str]], Awaitable[Mapping[str, T]]]) -> _Flight[T]:
        async def compute() -> Mapping[str, T]:
            try:
                return await start(keys)
            finally:
                self._leave(flight)

        task = detached(compute())
        task.add_done_callback(failed)
        flight = _Flight(keys, task)
        self._flights.update((key, flight) for key in keys)
        return flight

    def _leave(self, flight: _Flight[T]) -> None:
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]


async def _landed(flight: _Flight[T]) -> Mapping[str, T]:
    try:
        return await asyncio.shield(flight.task)
    except asyncio.CancelledError:
        waiter = asyncio.current_task()
        if flight.task.cancelled() and not (waiter and waiter.cancelling()):
            # Cancelled from below, not by our caller: that is a failure, not a cancellation, to this waiter.
            raise UnavailableError(f"work on block {flight.keys[0]} was cancelled; ask again") from None
        raise
