"""The functions that Serve's gRPC servers call, on a real gRPC server."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockrag.access import Access
from blockrag.gateway.servicers import APPLICATION_OF_SERVICE, ForgivingServer, HealthServicer, add_services_to_server
from blockrag.grpc_status import rpc
from blockrag.services import GRPC_SERVICER_FUNCTION
from blockrag.settings import Settings
from blockrag.v1 import rag_pb2, rag_pb2_grpc, system_pb2

REPOSITORY = Path(__file__).resolve().parents[3]


class Rag:
    access = Access(Settings())

    @rpc
    async def Generate(self, request: rag_pb2.GenerateRequest) -> AsyncIterator[rag_pb2.GenerateResponse]:
        yield rag_pb2.GenerateResponse(request_id=request.question)

    @rpc
    async def Retrieve(self, request: rag_pb2.RetrieveRequest) -> rag_pb2.RetrieveResponse:
        return rag_pb2.RetrieveResponse(request_id=request.query)


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    serving = frozenset({"gateway", "decoder"})
    server = grpc.aio.server()
    rag_pb2_grpc.add_RagServiceServicer_to_server(Rag(), ForgivingServer(server))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(lambda: serving), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(None)


def test_every_service_of_the_protocol_is_served() -> None:
    served: set[str] = set()

    class Recorder:
        def add_generic_rpc_handlers(self, handlers: Any) -> None: ...

        def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None:
            served.add(service_name)

    module, function = GRPC_SERVICER_FUNCTION.rsplit(".", 1)
    getattr(importlib.import_module(module), function)(Anything(), Recorder())
    protocol = {file.stem for file in (REPOSITORY / "protos" / "blockrag" / "v1").glob("*.proto")}
    declared = {
        service.full_name
        for name in protocol
        for service in importlib.import_module(f"blockrag.v1.{name}_pb2").DESCRIPTOR.services_by_name.values()
    }
    assert served == {*declared, "grpc.health.v1.Health"}
    assert declared == set(APPLICATION_OF_SERVICE) - {""}


class Anything:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_health_is_answered_by_the_server_itself() -> None:
    passed: list[str] = []

    class Server:
        def add_passthrough_service(self, name: str) -> None:
            passed.append(name)

        def add_generic_rpc_handlers(self, handlers: Any) -> None: ...

        def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None: ...

    add_services_to_server(Anything(), Server())
    assert passed == ["grpc.health.v1.Health"]


async def test_bytes_that_are_no_message_are_the_clients_mistake(channel: grpc.aio.Channel) -> None:
    bad_utf8 = b"\x0a\x03\xff\xfe\xfd"
    unary = channel.unary_unary("/blockrag.v1.RagService/Retrieve")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await unary(bad_utf8)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in (refused.value.details() or "")
    stream = channel.unary_stream("/blockrag.v1.RagService/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        _ = [message async for message in stream(bad_utf8)]
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_good_messages_pass(channel: grpc.aio.Channel) -> None:
    stub = rag_pb2_grpc.RagServiceStub(channel)
    assert (await stub.Retrieve(rag_pb2.RetrieveRequest(query="q"))).request_id == "q"


async def test_health_of_each_application(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    async def check(service: str) -> int:
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    assert await check("") == health_pb2.HealthCheckResponse.SERVING
    assert await check("blockrag.v1.DecoderService") == health_pb2.HealthCheckResponse.SERVING
    assert await check("blockrag.v1.EncoderService") == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await check(system_pb2.DESCRIPTOR.name)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_gives_the_state_at_once(channel: grpc.aio.Channel) -> None:
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    first = await call.read()
    assert first.status == health_pb2.HealthCheckResponse.SERVING
    call.cancel()
