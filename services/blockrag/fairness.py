"""How tenants share places and a queue. Counts only; whoever uses it holds a lock or lives in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


def has_room(held: int, taken: int, places: int) -> bool:
    """Whether a tenant that holds ``held`` of the ``taken`` places may have another one.

    As long as it then holds no more than are left free: one tenant alone comes to half of them, two to a third each,
    and whoever comes next finds as many free as each of them has.
    """
    return taken < places and held < max(1, places - taken)


class FairQueue(Generic[Item]):
    """Those who wait, in turns by tenant: whoever's items took least so far is next (start-time fair queueing).

    An item is ``cost`` long. Of n tenants that wait, each has an n-th part of what is taken, however many items each
    of them has waiting; of one tenant, the order is that of arrival. Who was away has saved nothing up.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[tuple[float, Item]]] = {}  # cost and item; no empty ones
        self._start: dict[str, float] = {}  # of the next item of each tenant, in costs that were taken
        self._now = 0.0  # the latest start of what was taken

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Item]:
        for queue in self._queues.values():
            yield from (item for _, item in queue)

    def of(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return len(self._queues.get(tenant, ()))

    def append(self, tenant: str, item: Item, cost: float) -> None:
        """Behind the tenant's others."""
        if tenant not in self._queues:
            self._queues[tenant] = deque()
            self._start[tenant] = max(self._now, self._start.get(tenant, 0.0))
        self._queues[tenant].append((cost, item))

    def turns(self) -> list[tuple[str, Item]]:
        """The first of each tenant that waits, with the tenant, in the order of their turns."""
        order = sorted(self._queues, key=self._start.__getitem__)  # of equals, who has waited longer
        return [(tenant, self._queues[tenant][0][1]) for tenant in order]

    def take(self, tenant: str) -> Item:
        """Takes a tenant's first. Raises ``KeyError`` when it has none."""
        cost, item = self._queues[tenant].popleft()
        self._now = max(self._now, self._start[tenant])
        self._start[tenant] += cost
        self._forget(tenant)
        return item

    def remove(self, tenant: str, item: Item) -> None:
        """Takes an item out that leaves without its turn. Raises ``ValueError`` when it does not wait."""
        queue = self._queues.get(tenant, deque())
        for place, (_, waiting) in enumerate(queue):
            if waiting is item:
                del queue[place]
                self._forget(tenant)
                return
        raise ValueError("the item does not wait")

    def _forget(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant]
        # A start in the past counts as now: it says nothing more.
        away = [name for name, start in self._start.items() if name not in self._queues and start <= self._now]
        for name in away:
            del self._start[name]


class Turns:
    """Places that are taken for a while; who finds none waits, in turns by tenant. For one event loop."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Holds a place."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(tenant)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, tenant: str) -> None:
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(tenant, called, 1)
        try:
            await called
        except asyncio.CancelledError:
            if called.cancelled():
                with contextlib.suppress(ValueError):  # taken out already
                    self._waiting.remove(tenant, called)
            else:  # called in the moment in which it left
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while turns := self._waiting.turns():
            called = self._waiting.take(turns[0][0])
            if not called.done():
                called.set_result(None)
                return
        self._free += 1
