"""What a replica works on at a time, and what each tenant may in a minute; more is refused at once, not queued.

Stored things are counted by the retriever.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from blockrag.errors import OverloadedError
from blockrag.fairness import has_room
from blockrag.grpc_status import as_known_error
from blockrag.limits import MIB
from blockrag.settings import GatewaySettings
from blockrag.tenants import LimitsOf
from blockrag.v1.rag_pb2 import GenerateResponse
from blockrag.v1.retriever_pb2 import TenantStored
from blockrag.v1.system_pb2 import Quota, TenantQuotas

_LEAST_HINT_MS = 50
_MOST_HINT_MS = 5_000
_SMOOTHING = 0.1
_MINUTE_S = 60.0
_ROUNDING = 1e-6
"""Of a use that is over."""
_CLOSED_SHARE = 1 / 8
"""Of the time that the decoder names: some of those that wait there leave meanwhile, never all of them."""

LimitOf = Callable[[str], int | None]
"""A tenant's limit in this replica; None: it has none of its own."""


class Admission:
    """Counts requests in progress. Not for several threads: it lives in one event loop."""

    def __init__(
        self, what: str, max_inflight: int, limit_of: LimitOf = lambda tenant: None, *, several_tenants: bool = False
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


class Closed:
    """Tenants whose questions the decoder refused a moment ago: the next ones are refused here.

    A question is searched and planned before the decoder can refuse it, which takes as much of the machine as a short
    answer, and takes it from those who asked for less. Not for several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` in seconds."""
        self._clock = clock
        self._refused: dict[str, tuple[OverloadedError, float]] = {}  # and when

    def note(self, tenant: str, refused: OverloadedError) -> None:
        """What the decoder said to a question of the tenant's."""
        self._refused[tenant] = (refused, self._clock())

    def check(self, tenant: str) -> None:
        """Raises what the decoder said, with what is left of its hint, while it would most likely say so again."""
        if tenant not in self._refused:
            return
        refused, then = self._refused[tenant]
        passed_ms = (self._clock() - then) * 1000
        if passed_ms < refused.retry_after_ms * _CLOSED_SHARE:
            raise OverloadedError(refused.what, math.ceil(refused.retry_after_ms - passed_ms))
        del self._refused[tenant]


@dataclass
class Metered:
    """What an answer has used so far."""

    tokens: int = 0
    _whole: bool = False

    def see(self, event: GenerateResponse) -> None:
        """Counts an event's text, or with the last one what the whole answer used."""
        if event.HasField("completion"):
            usage = event.completion.usage
            self.tokens, self._whole = usage.prompt_tokens + usage.completion_tokens, True
        else:
            self.tokens += event.text.tokens

    def end(self, prompt_tokens: int) -> None:
        """Counts the prompt of an answer that was not heard to its end."""
        if not self._whole:
            self.tokens += prompt_tokens


class Quotas:
    """The places of this replica, and each tenant's part of them. For one event loop."""

    def __init__(self, settings: GatewaySettings, limits_of: LimitsOf) -> None:
        """``limits_of``: a tenant's limits as they are now; each of the gateway's replicas holds its share of them."""
        self._limits_of = limits_of
        self._replicas = settings.replicas
        several = settings.asks_for_keys
        self.answers = Admission(
            "answers are in progress", settings.max_inflight, self._share("questions"), several_tenants=several
        )
        self.ingests = Admission(
            "documents are being received", settings.max_uploads, self._share("uploads"), several_tenants=several
        )
        self.warmings = Admission("warmings are under way", settings.max_warmings, several_tenants=several)
        self._questions = Rate("questions_a_minute", self._share("questions_a_minute"))
        self._tokens = Rate("tokens_a_minute", self._share("tokens_a_minute"))
        self._closed = Closed()

    @contextmanager
    def answer(self, tenant: str) -> Iterator[Metered]:
        """A question that the decoder is to answer; raises ``OverloadedError`` also where it was full a moment ago."""
        self._closed.check(tenant)
        with self.question(tenant) as metered:
            try:
                yield metered
            except Exception as error:
                known = as_known_error(error)
                if isinstance(known, OverloadedError):
                    self._closed.note(tenant, known)
                raise

    @contextmanager
    def question(self, tenant: str) -> Iterator[Metered]:
        """A question or a search from its beginning to its end; raises ``OverloadedError`` naming the limit."""
        self._questions.check(tenant)
        self._tokens.check(tenant)
        metered = Metered()
        with self.answers.slot(tenant):
            self._questions.charge(tenant, 1)
            try:
                yield metered
            finally:
                self._tokens.charge(tenant, metered.tokens)

    def rows(self, tenants: Iterable[str], stored: Iterable[TenantStored]) -> list[TenantQuotas]:
        """For each tenant, what it uses of what: of places and rates in this replica, with its share of the limit."""
        held = {row.tenant: row for row in stored}
        return [
            TenantQuotas(tenant=tenant, quotas=self._quotas(tenant, held.get(tenant, TenantStored())))
            for tenant in sorted({*tenants, *held})
        ]

    def _quotas(self, tenant: str, stored: TenantStored) -> list[Quota]:
        here: Mapping[str, float] = {
            "uploads": self.ingests.of(tenant),
            "questions": self.answers.of(tenant),
            "questions_a_minute": self._questions.used(tenant),
            "tokens_a_minute": self._tokens.used(tenant),
        }
        whole = {
            "collections": stored.collections,
            "documents": stored.documents,
            "index_mb": -(-stored.bytes // MIB),
        }
        limits = self._limits_of(tenant)
        return [Quota(name=name, used=used, limit=getattr(limits, name) or 0) for name, used in whole.items()] + [
            Quota(name=name, used=round(used), limit=self._share(name)(tenant) or 0) for name, used in here.items()
        ]

    def _share(self, name: str) -> LimitOf:
        """This replica's part of the limit of this name, at least one."""

        def share_of(tenant: str) -> int | None:
            limit: int | None = getattr(self._limits_of(tenant), name)
            return None if limit is None else -(-limit // self._replicas)

        return share_of
