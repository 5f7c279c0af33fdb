"""How many requests a replica works on at a time; one more is refused at once instead of waiting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from blockrag.errors import OverloadedError

_LEAST_HINT_MS = 50
_MOST_HINT_MS = 5_000
_SMOOTHING = 0.1


class Admission:
    """Counts requests in progress. Not for several threads: it lives in one event loop."""

    def __init__(self, what: str, max_inflight: int, max_of_tenant: int | None = None) -> None:
        """``what`` ends the sentence that a refusal tells: "64 answers are in progress". ``max_of_tenant``: most of
        them for one tenant, so that none keeps the others out; None: all."""
        self._what = what
        self._max_inflight = max_inflight
        self._max_of_tenant = max_of_tenant if max_of_tenant is not None else max_inflight
        self._running = 0
        self._of_tenant: Counter[str] = Counter()
        self._mean_ms = 1000.0

    @property
    def running(self) -> int:
        """Requests in progress."""
        return self._running

    @contextmanager
    def slot(self, tenant: str = "") -> Iterator[None]:
        """Holds one place; raises ``OverloadedError`` with a retry hint when there is none (for this tenant)."""
        if self._running >= self._max_inflight:
            raise OverloadedError(f"{self._running} {self._what}", self._retry_after_ms())
        if self._of_tenant[tenant] >= self._max_of_tenant:
            raise OverloadedError(f"{self._of_tenant[tenant]} {self._what} for {tenant}", self._retry_after_ms())
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

    def _retry_after_ms(self) -> int:
        # With n requests under way, about one ends in every n-th part of their mean time.
        return int(min(max(self._mean_ms / self._max_inflight, _LEAST_HINT_MS), _MOST_HINT_MS))
