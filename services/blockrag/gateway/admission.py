"""What a replica works on at a time, and for a tenant in a minute; what is more is refused at once, not queued."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockrag.errors import OverloadedError
from blockrag.fairness import has_room

_LEAST_HINT_MS = 50
_MOST_HINT_MS = 5_000
_SMOOTHING = 0.1
_MINUTE_S = 60.0
_ROUNDING = 1e-6
"""Of a use that is over."""

LimitOf = Callable[[str], int | None]
"""A tenant's limit in this replica; None: it has none of its own."""


def _unlimited(tenant: str) -> None:
    return None


class Admission:
    """Counts requests in progress. Not for several threads: it lives in one event loop."""

    def __init__(
        self, what: str, max_inflight: int, limit_of: LimitOf = _unlimited, *, several_tenants: bool = False
    ) -> None:
        """``what`` ends the sentence that a refusal tells: "64 answers are in progress". ``several_tenants``: none of
        them takes all places, see ``has_room``."""
        self._what = what
        self._max_inflight = max_inflight
        self._limit_of = limit_of
        self._several_tenants = several_tenants
        self._running = 0
        self._of_tenant: Counter[str] = Counter()
        self._mean_ms = 1000.0

    @property
    def running(self) -> int:
        """Requests in progress."""
        return self._running

    def of(self, tenant: str) -> int:
        """A tenant's requests in progress."""
        return self._of_tenant[tenant]

    @contextmanager
    def slot(self, tenant: str = "") -> Iterator[None]:
        """Holds one place; raises ``OverloadedError`` with a retry hint when there is none (for this tenant)."""
        held, limit = self._of_tenant[tenant], self._limit_of(tenant)
        if limit is not None and held >= limit:
            raise OverloadedError(
                f"{held} {self._what} for {tenant}, its limit here is {limit}", self._retry_after_ms(limit)
            )
        if self._running >= self._max_inflight:
            raise OverloadedError(f"{self._running} {self._what}", self._retry_after_ms(self._max_inflight))
        if self._several_tenants and not has_room(held, self._running, self._max_inflight):
            raise OverloadedError(f"{held} {self._what} for {tenant}, its share now", self._retry_after_ms(held))
        self._running += 1
        self._of_tenant[tenant] += 1
        started = time.perf_counter()
        try:
            yield
        finally:
            self._running -= 1
            self._of_tenant[tenant] -= 1
            if not self._of_tenant[tenant]:
                del self._of_tenant[tenant]
            took_ms = (time.perf_counter() - started) * 1000
            self._mean_ms += _SMOOTHING * (took_ms - self._mean_ms)

    def _retry_after_ms(self, running: int) -> int:
        # With n requests under way, about one ends in every n-th part of their mean time.
        return int(min(max(self._mean_ms / running, _LEAST_HINT_MS), _MOST_HINT_MS))


class Rate:
    """What each tenant used in the last minute: a budget that fills up evenly, to at most a minute's worth.

    What is charged may be more than was left: a debt, which is waited off. Not for several threads.
    """

    def __init__(self, what: str, limit_of: LimitOf, clock: Callable[[], float] = time.monotonic) -> None:
        """``what`` is the limit's name, which a refusal tells; ``clock`` in seconds."""
        self._what = what
        self._limit_of = limit_of
        self._clock = clock
        self._used: dict[str, tuple[float, float]] = {}  # what is not free again, and when that was so

    def used(self, tenant: str) -> float:
        """What is not free again."""
        amount, then = self._used.get(tenant, (0.0, 0.0))
        limit = self._limit_of(tenant)
        return max(0.0, amount - (self._clock() - then) * limit / _MINUTE_S) if limit is not None else 0.0

    def check(self, tenant: str) -> None:
        """Raises ``OverloadedError`` when nothing is left, with the time until something is."""
        limit = self._limit_of(tenant)
        if limit is None:
            return
        used = self.used(tenant)
        if used - (limit - 1) > _ROUNDING:
            wait_ms = math.ceil((used - (limit - 1)) * 1000 * _MINUTE_S / limit)
            raise OverloadedError(f"{tenant} has used its {limit} {self._what} of this gateway", wait_ms)

    def charge(self, tenant: str, amount: float) -> None:
        """Counts what was used."""
        if self._limit_of(tenant) is None:
            self._used.pop(tenant, None)
            return
        self._used[tenant] = (self.used(tenant) + amount, self._clock())
