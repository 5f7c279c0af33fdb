"""What a tenant does, against its limits."""

from __future__ import annotations

import pytest

from blockrag.errors import OverloadedError
from blockrag.gateway.admission import Quotas
from blockrag.settings import GatewaySettings
from blockrag.tenants import NO_LIMITS, TenantLimits, TenantSettings
from blockrag.v1.common_pb2 import Usage
from blockrag.v1.rag_pb2 import Completion, GenerateResponse, TextChunk
from blockrag.v1.retriever_pb2 import TenantStored

TENANTS = tuple(TenantSettings(name=name, api_key=f"{name}-key-0123456789") for name in ("acme", "umbrella"))


def quotas(limits: TenantLimits, replicas: int = 1) -> Quotas:
    settings = GatewaySettings(tenants=TENANTS, replicas=replicas, max_inflight=16)
    return Quotas(settings, lambda tenant: limits if tenant == "acme" else NO_LIMITS)


def text(tokens: int) -> GenerateResponse:
    return GenerateResponse(text=TextChunk(text="x", tokens=tokens))


def completion(prompt: int, answer: int) -> GenerateResponse:
    usage = Usage(prompt_tokens=prompt, completion_tokens=answer)
    return GenerateResponse(completion=Completion(usage=usage))


def test_questions_in_flight_and_a_minute_are_limited_for_the_one_tenant() -> None:
    held = quotas(TenantLimits(questions=1, questions_a_minute=3))
    with held.question("acme"):
        with pytest.raises(OverloadedError, match="its limit here is 1"), held.question("acme"):
            pass
        with held.question("umbrella"), held.question("umbrella"):
            pass
    for _ in range(2):
        with held.question("acme"):
            pass
    with pytest.raises(OverloadedError, match="3 questions_a_minute") as refused, held.question("acme"):
        pass
    assert 0 < refused.value.retry_after_ms <= 20_000
    for _ in range(10):
        with held.question("umbrella"):
            pass


def test_an_answer_s_tokens_are_charged_at_its_end_whole_or_as_far_as_it_came() -> None:
    held = quotas(TenantLimits(tokens_a_minute=100))
    with held.question("acme") as metered:
        metered.see(text(3))
        metered.see(completion(prompt=40, answer=5))
        metered.end(prompt_tokens=40)
    assert used(held, "tokens_a_minute") == 45
    with pytest.raises(RuntimeError), held.question("acme") as metered:
        try:
            metered.see(text(20))
            raise RuntimeError
        finally:
            metered.end(prompt_tokens=40)
    with pytest.raises(OverloadedError, match="100 tokens_a_minute"), held.question("acme"):
        pass


def test_each_gateway_holds_its_share_and_at_least_one() -> None:
    held = quotas(TenantLimits(questions=5, uploads=1, tokens_a_minute=1000), replicas=2)
    assert [limit(held, name) for name in ("questions", "uploads", "tokens_a_minute")] == [3, 1, 500]


def test_usage_is_told_by_tenant_with_what_is_stored() -> None:
    held = quotas(TenantLimits(collections=4, index_mb=20))
    stored = [TenantStored(tenant="acme", collections=2, documents=7, bytes=2**20 + 1)]
    with held.question("acme"):
        rows = {row.tenant: row.quotas for row in held.rows(("acme", "umbrella"), stored)}
    assert [(quota.name, quota.used, quota.limit) for quota in rows["acme"]] == [
        ("collections", 2, 4),
        ("documents", 7, 0),
        ("index_mb", 2, 20),
        ("uploads", 0, 0),
        ("questions", 1, 0),
        ("questions_a_minute", 0, 0),
        ("tokens_a_minute", 0, 0),
    ]
    assert {quota.used for quota in rows["umbrella"]} == {0}
    assert [quota.name for quota in rows["acme"]] == list(TenantLimits.model_fields)


def used(held: Quotas, name: str) -> int:
    return next(quota.used for quota in held.rows(("acme",), ())[0].quotas if quota.name == name)


def limit(held: Quotas, name: str) -> int:
    return next(quota.limit for quota in held.rows(("acme",), ())[0].quotas if quota.name == name)
