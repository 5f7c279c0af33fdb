"""The state of the system, whatever part of it fails."""

from __future__ import annotations

from blockrag.access import THE_SYSTEM, Caller
from blockrag.compressor.compression_request import CompressionAbility
from blockrag.errors import UnavailableError
from blockrag.gateway.describing import Describing
from blockrag.settings import GatewaySettings
from blockrag.v1 import compressor_pb2, decoder_pb2, encoder_pb2, kv_cache_pb2, retriever_pb2
from blockrag.v1.system_pb2 import DescribeResponse, TenantQuotas

from .fakes import forever


class Retriever:
    async def status(self) -> retriever_pb2.GetRetrieverStatusResponse:
        rows = [
            retriever_pb2.TenantStored(tenant=name, collections=1, passages=passages)
            for name, passages in (("acme", 2), ("umbrella", 5))
        ]
        return retriever_pb2.GetRetrieverStatusResponse(backend="edge", collections=2, passages=7, tenants=rows)


class Encoder:
    async def status(self) -> encoder_pb2.GetEncoderStatusResponse:
        return encoder_pb2.GetEncoderStatusResponse(bundle_fingerprint="f00d")


class BrokenCache:
    async def status(self) -> kv_cache_pb2.GetKvCacheStatusResponse:
        raise UnavailableError("kv_cache: not deployed\nsecond line")


class SilentCache:
    async def status(self) -> kv_cache_pb2.GetKvCacheStatusResponse:
        await forever()
        raise AssertionError


class Decoder:
    def __init__(self, fingerprint: str = "f00d") -> None:
        self._fingerprint = fingerprint

    async def status(self) -> decoder_pb2.GetDecoderStatusResponse:
        return decoder_pb2.GetDecoderStatusResponse(
            bundle_fingerprint=self._fingerprint, max_positions=4096, running=3, generated_tokens=77
        )


class Compressor:
    async def status(self) -> compressor_pb2.TokenizePassagesResponse:
        return compressor_pb2.TokenizePassagesResponse()


class SharedCache:
    async def status(self) -> kv_cache_pb2.GetKvCacheStatusResponse:
        rows = [kv_cache_pb2.TenantUsage(tenant=name, blocks=3) for name in ("acme", "umbrella")]
        return kv_cache_pb2.GetKvCacheStatusResponse(blocks=6, tenants=rows)


async def describe(
    cache: BrokenCache | SilentCache | SharedCache, decoder: Decoder | None = None, caller: Caller = THE_SYSTEM
) -> DescribeResponse:
    describing = Describing(
        {
            "retriever": Retriever().status,
            "encoder": Encoder().status,
            "kv_cache": cache.status,
            "compressor": Compressor().status,
            "decoder": (decoder or Decoder()).status,
        },
        limits=GatewaySettings(max_document_mb=3),
        bundle_fingerprint="f00d",
        max_positions=99,
        ability=CompressionAbility("reader", 8, frozenset({"query"})),
        quotas=lambda stored: [TenantQuotas(tenant=row.tenant) for row in stored],
        timeout_s=0.05,
    )
    return await describing.describe(caller)


async def test_a_broken_service_is_listed_with_its_reason() -> None:
    description = await describe(BrokenCache())
    health = {service.name: service for service in description.services}
    assert list(health) == ["gateway", "retriever", "encoder", "kv_cache", "compressor", "decoder"]
    assert not health["kv_cache"].healthy
    assert health["kv_cache"].detail == "kv_cache: not deployed"
    assert all(service.healthy for name, service in health.items() if name != "kv_cache")
    assert description.retriever.passages == 7
    assert description.max_positions == 4096
    assert description.max_document_bytes == 3 * 2**20
    assert description.bundle_name == "reader"
    assert description.chunk_tokens == 8
    assert description.compresses_chunks


async def test_a_silent_service_is_not_waited_for() -> None:
    description = await describe(SilentCache())
    (silent,) = [service for service in description.services if not service.healthy]
    assert silent.name == "kv_cache"
    assert silent.detail == "no answer within 0.05 s"


async def test_another_bundle_in_the_decoder_is_told() -> None:
    description = await describe(BrokenCache(), Decoder("0ld"))
    assert any(service.name == "decoder" and "another bundle" in service.detail for service in description.services)


async def test_a_tenant_is_shown_its_own_row_and_an_operator_all() -> None:
    rows = [
        [row.tenant for row in (await describe(SharedCache(), caller=caller)).kv_cache.tenants]
        for caller in (Caller("acme"), Caller("nobody"), Caller("acme", operator=True), THE_SYSTEM)
    ]
    assert rows == [["acme"], [], ["acme", "umbrella"], ["acme", "umbrella"]]


async def test_of_sums_over_all_tenants_a_tenant_is_shown_its_own() -> None:
    seen = await describe(SharedCache(), caller=Caller("acme"))

    assert (seen.retriever.backend, seen.retriever.collections, seen.retriever.passages) == ("edge", 1, 2)
    assert [row.tenant for row in seen.retriever.tenants] == ["acme"]
    assert seen.kv_cache.blocks == 3
    assert (seen.decoder.max_positions, seen.decoder.running, seen.decoder.generated_tokens) == (4096, 0, 0)
    assert [row.tenant for row in seen.tenants] == ["acme"]

    stranger = await describe(SharedCache(), caller=Caller("nobody"))
    assert (stranger.retriever.collections, stranger.retriever.passages, stranger.kv_cache.blocks) == (0, 0, 0)
    assert not stranger.tenants

    everything = await describe(SharedCache(), caller=Caller("acme", operator=True))
    assert (everything.retriever.passages, everything.kv_cache.blocks, everything.decoder.running) == (7, 6, 3)
    assert [row.tenant for row in everything.tenants] == ["acme", "umbrella"]
