"""What each tenant does in this gateway, against its limits. Stored things are counted by the retriever."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from blockrag.gateway.admission import Admission, LimitOf, Rate
from blockrag.limits import MIB
from blockrag.settings import GatewaySettings
from blockrag.tenants import TenantLimits
from blockrag.v1.common_pb2 import Usage
from blockrag.v1.rag_pb2 import GenerateResponse
from blockrag.v1.retriever_pb2 import TenantStored
from blockrag.v1.system_pb2 import Quota, TenantQuotas


@dataclass
class Metered:
    """What an answer has used so far."""

    tokens: int = 0

    def see(self, event: GenerateResponse) -> None:
        """Counts an event's text, or with the last one what the whole answer used."""
        if event.HasField("completion"):
            self.tokens = _tokens(event.completion.usage)
        else:
            self.tokens += event.text.tokens


class Quotas:
    """The places of this replica, and each tenant's part of them. For one event loop."""

    def __init__(self, settings: GatewaySettings, limits_of: Callable[[str], TenantLimits]) -> None:
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


def _tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens
