"""A second gateway in the running system, which asks for keys: what a tenant sees and what not."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from blockrag.client import BlockragClient
from blockrag.settings import GatewaySettings
from blockrag.tenants import TenantLimits, TenantSettings
from blockrag.v1 import rag_pb2, rag_pb2_grpc, system_pb2, system_pb2_grpc
from tests.integration.conftest import Cluster

KEY = ("authorization", "Bearer acme-key-0123456789")


@pytest.fixture
async def channel(cluster: Cluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.target) as opened:
        yield opened


@pytest.fixture
async def collection(client: BlockragClient) -> AsyncIterator[str]:
    """A collection of the public tenant, removed at the end."""
    await client.ingest_text("door", "Only the public tenant may know of this zinc door.", collection="doors")
    yield "doors"
    await client.delete_collection("doors")


@pytest.fixture(scope="module")
def guarded(cluster: Cluster) -> Iterator[tuple[tuple[str, str], ...]]:
    """Metadata of a second gateway in the same system, which has a tenant."""
    with warnings.catch_warnings():
        # Importing Serve warns about its own use of pydantic.
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray import serve

        from blockrag.gateway.deployment import Gateway

    tenant = TenantSettings(name="acme", api_key="acme-key-0123456789")
    limited = TenantSettings(
        name="limited", api_key="limited-key-0123456789", limits=TenantLimits(questions_a_minute=2)
    )
    gateway = GatewaySettings(tenants=(tenant, limited), replicas=1)
    settings = cluster.settings.model_copy(update={"gateway": gateway})
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0.1})(Gateway)
    serve.run(deployment.bind(settings), name="guarded", route_prefix="/guarded")
    yield (("application", "guarded"),)
    serve.delete("guarded")


async def test_a_key_is_asked_for_and_decides_the_tenant(
    guarded: tuple[tuple[str, str], ...], channel: grpc.aio.Channel, client: BlockragClient, collection: str
) -> None:
    stub = rag_pb2_grpc.RagServiceStub(channel)  # type: ignore[no-untyped-call]
    request = rag_pb2.RetrieveRequest(query="Where is Norway?", collection=collection)
    for wrong in ((), (("authorization", "Bearer wrong-key-0123456789"),)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Retrieve(request, metadata=(*guarded, *wrong), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    # The public tenant's collection is none of acme's.
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Retrieve(request, metadata=(*guarded, KEY), timeout=10)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_tenant_sees_neither_another_s_cache_nor_its_traces(
    guarded: tuple[tuple[str, str], ...], channel: grpc.aio.Channel, client: BlockragClient, collection: str
) -> None:
    answer = await client.ask("Who may know of the door?", collection=collection)
    trace_id = answer.completion.trace_id
    assert await client.trace(trace_id)
    assert "public" in {row["tenant"] for row in (await client.describe()).kv_cache["tenants"]}

    system = system_pb2_grpc.SystemServiceStub(channel)  # type: ignore[no-untyped-call]
    described = await system.Describe(system_pb2.DescribeRequest(), metadata=(*guarded, KEY), timeout=20)
    assert "public" not in {row.tenant for row in described.kv_cache.tenants}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await system.GetTrace(system_pb2.GetTraceRequest(trace_id=trace_id), metadata=(*guarded, KEY), timeout=10)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_limit_that_is_reached_is_named_and_told_to_its_tenant_alone(
    guarded: tuple[tuple[str, str], ...], channel: grpc.aio.Channel, client: BlockragClient, collection: str
) -> None:
    stub = rag_pb2_grpc.RagServiceStub(channel)  # type: ignore[no-untyped-call]
    key = ("authorization", "Bearer limited-key-0123456789")
    request = rag_pb2.RetrieveRequest(query="Where is Norway?", collection="nothing")
    codes = []
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Retrieve(request, metadata=(*guarded, key), timeout=10)
        codes.append(refused.value.code())
    assert codes == [grpc.StatusCode.NOT_FOUND] * 2 + [grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert "2 questions_a_minute" in (refused.value.details() or "")
    assert "retry in" in (refused.value.details() or "")

    system = system_pb2_grpc.SystemServiceStub(channel)  # type: ignore[no-untyped-call]
    described = await system.Describe(system_pb2.DescribeRequest(), metadata=(*guarded, key), timeout=20)
    (row,) = described.tenants
    assert row.tenant == "limited"
    assert {quota.name: (quota.used, quota.limit) for quota in row.quotas}["questions_a_minute"] == (2, 2)
    assert (described.retriever.collections, described.retriever.passages) == (0, 0)
    assert (described.kv_cache.blocks, described.decoder.generated_tokens) == (0, 0)

    operator = await client.describe()
    assert {row["tenant"] for row in operator.tenants} >= {"public"}
    assert operator.retriever["passages"]
