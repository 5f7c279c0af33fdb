"""The state of the whole system, gathered from every service at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Protocol

import blockrag
from blockrag.access import Caller, show_own_rows
from blockrag.settings import GatewaySettings
from blockrag.v1 import compressor_pb2, decoder_pb2, encoder_pb2, kv_cache_pb2, retriever_pb2
from blockrag.v1.system_pb2 import DescribeResponse, ServiceHealth

STATUS_TIMEOUT_S = 5.0
"""A service that says nothing for so long counts as unhealthy."""


class RetrieverState(Protocol):
    async def status(self) -> retriever_pb2.GetRetrieverStatusResponse: ...


class EncoderState(Protocol):
    async def status(self) -> encoder_pb2.GetEncoderStatusResponse: ...


class KvCacheState(Protocol):
    async def status(self) -> kv_cache_pb2.GetKvCacheStatusResponse: ...


class DecoderState(Protocol):
    async def status(self) -> decoder_pb2.GetDecoderStatusResponse: ...


class CompressorState(Protocol):
    async def tokenize_passages(
        self, request: compressor_pb2.TokenizePassagesRequest
    ) -> compressor_pb2.TokenizePassagesResponse: ...


@dataclass(frozen=True)
class Describing:
    """Asks the services it is given."""

    retriever: RetrieverState
    encoder: EncoderState
    kv_cache: KvCacheState
    compressor: CompressorState
    decoder: DecoderState
    limits: GatewaySettings
    bundle_name: str
    bundle_fingerprint: str
    max_positions: int
    timeout_s: float = STATUS_TIMEOUT_S

    async def describe(self, caller: Caller) -> DescribeResponse:
        """Never fails for a service that does: it is listed as unhealthy, with the reason.

        Of the tenants' rows a caller who is no operator sees its own.
        """
        (
            (retriever, retriever_health),
            (encoder, encoder_health),
            (kv_cache, kv_cache_health),
            (_, compressor_health),
            (decoder, decoder_health),
        ) = await asyncio.gather(
            self._ask("retriever", self.retriever.status()),
            self._ask("encoder", self.encoder.status()),
            self._ask("kv_cache", self.kv_cache.status()),
            # The compressor has no state of its own to report; that it answers is what counts.
            self._ask("compressor", self.compressor.tokenize_passages(compressor_pb2.TokenizePassagesRequest())),
            self._ask("decoder", self.decoder.status()),
        )
        if kv_cache is not None:
            show_own_rows(kv_cache.tenants, caller)
        healths = [
            ServiceHealth(name="gateway", healthy=True),
            retriever_health,
            encoder_health,
            kv_cache_health,
            compressor_health,
            decoder_health,
        ]
        for name, status, health in (("encoder", encoder, encoder_health), ("decoder", decoder, decoder_health)):
            if status is not None and status.bundle_fingerprint != self.bundle_fingerprint:
                health.healthy = False
                health.detail = f"{name} runs another bundle than the gateway: {status.bundle_fingerprint}"
        return DescribeResponse(
            version=blockrag.__version__,
            bundle_fingerprint=self.bundle_fingerprint,
            bundle_name=self.bundle_name,
            max_positions=decoder.max_positions if decoder is not None else self.max_positions,
            max_top_k=self.limits.max_top_k,
            max_question_chars=self.limits.max_question_chars,
            max_document_bytes=self.limits.max_document_mb * 2**20,
            services=healths,
            retriever=retriever,
            encoder=encoder,
            kv_cache=kv_cache,
            decoder=decoder,
        )

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
