"""The state of the whole system, gathered from every service at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

import blockrag
from blockrag.access import Caller, show_own, show_own_rows
from blockrag.compressor.compression_request import CompressionAbility
from blockrag.settings import GatewaySettings
from blockrag.v1.retriever_pb2 import TenantStored
from blockrag.v1.system_pb2 import DescribeResponse, ServiceHealth, TenantQuotas

STATUS_TIMEOUT_S = 5.0
"""A service that says nothing for so long counts as unhealthy."""


@dataclass(frozen=True)
class Describing:
    """Asks the services it is given."""

    services: Mapping[str, Callable[[], Awaitable[Message]]]
    """What asks each for its state: all but the gateway, by name, in the order in which they are listed."""
    limits: GatewaySettings
    bundle_fingerprint: str
    max_positions: int
    ability: CompressionAbility
    quotas: Callable[[Iterable[TenantStored]], Iterable[TenantQuotas]]
    """What all tenants use of their limits, from what they store."""
    timeout_s: float = STATUS_TIMEOUT_S

    async def describe(self, caller: Caller) -> DescribeResponse:
        """Never fails for a service that does: it is listed as unhealthy, with the reason.

        A caller who is no operator sees of it what describes the system, and what is its own.
        """
        response = DescribeResponse(
            version=blockrag.__version__,
            bundle_fingerprint=self.bundle_fingerprint,
            bundle_name=self.ability.bundle_name,
            max_positions=self.max_positions,
            max_top_k=self.limits.max_top_k,
            max_question_chars=self.limits.max_question_chars,
            max_document_bytes=self.limits.max_document_mb * 2**20,
            chunk_tokens=self.ability.chunk_tokens,
            compresses_chunks=self.ability.policies is not None,
            services=[ServiceHealth(name="gateway", healthy=True)],
        )
        answers = await asyncio.gather(*(self._ask(name, ask()) for name, ask in self.services.items()))
        for state, health in answers:
            fingerprint = getattr(state, "bundle_fingerprint", self.bundle_fingerprint)
            if state is not None and fingerprint != self.bundle_fingerprint:
                health.healthy = False
                health.detail = f"{health.name} runs another bundle than the gateway: {fingerprint}"
            response.services.append(health)
            if state is not None and health.name in response.DESCRIPTOR.fields_by_name:
                getattr(response, health.name).CopyFrom(state)
        if response.HasField("decoder"):
            response.max_positions = response.decoder.max_positions
        response.tenants.extend(self.quotas(response.retriever.tenants))
        show_own_rows(response.tenants, caller)
        for status in (response.retriever, response.encoder, response.kv_cache, response.decoder):
            show_own(status, caller)
        return response

    async def _ask(self, name: str, status: Awaitable[Any]) -> tuple[Any, ServiceHealth]:
        started = time.perf_counter()
        answer = None
        detail = ""
        try:
            async with asyncio.timeout(self.timeout_s):
                answer = await status
        except TimeoutError:
            detail = f"no answer within {self.timeout_s:g} s"
        except Exception as error:
            detail = (str(error) or type(error).__name__).splitlines()[0][:500]
        milliseconds = (time.perf_counter() - started) * 1000
        return answer, ServiceHealth(name=name, healthy=not detail, detail=detail, milliseconds=milliseconds)
