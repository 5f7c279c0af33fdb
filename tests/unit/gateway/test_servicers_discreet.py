"""What clients are told of dead actors, by Serve's own gRPC server with a handler as its proxy has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from ray.exceptions import RayActorError
from ray.serve._private.grpc_util import (
    get_grpc_response_status,
    gRPCGenericServer,
    gRPCStreamingType,
    set_grpc_code_and_details,
)

from blockrag.errors import UnavailableError
from blockrag.gateway.servicers import LOST, add_services_to_server
from blockrag.grpc_status import INTERNAL_MESSAGE
from blockrag.status import error_of
from blockrag.v1 import rag_pb2, rag_pb2_grpc


class AnyServicer:
    """Has every method; what answers is the server's own handler."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


SECRETS = "The actor died: actor_id=0123abcd pid=4711 namespace=serve ip=192.0.2.7"


@pytest.fixture
async def fails_with() -> AsyncIterator[Callable[[Exception], Any]]:
    """Starts a server whose every call ends with an error, and gives a stub of it."""
    servers: list[Any] = []
    channels: list[grpc.aio.Channel] = []

    async def start(error: Exception) -> Any:
        def factory(service_method: str, streaming_type: gRPCStreamingType) -> Callable[..., Any]:
            async def call(request: Any, context: Any) -> bytes:
                set_grpc_code_and_details(context, get_grpc_response_status(error, None, "request"))
                return b""

            async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
                yield rag_pb2.GenerateResponse(request_id="r").SerializeToString()
                set_grpc_code_and_details(context, get_grpc_response_status(error, None, "request"))

            return stream if streaming_type is gRPCStreamingType.UNARY_STREAM else call

        server = gRPCGenericServer(factory)
        add_services_to_server(AnyServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        return rag_pb2_grpc.RagServiceStub(channels[-1])

    yield start
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop(None)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def test_a_dead_actor_is_unavailable_and_has_no_name(fails_with: Any) -> None:
    stub = await fails_with(RayActorError("0123abcd", SECRETS))
    error = await failure(stub.Retrieve(rag_pb2.RetrieveRequest()))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, LOST)
    stream = stub.Generate(rag_pb2.GenerateRequest())
    assert (await stream.read()).request_id == "r"
    error = await failure(stream.read())
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, LOST)
    assert isinstance(error_of(error.code(), error.details() or ""), UnavailableError)


async def test_what_serve_did_not_foresee_is_internal_and_says_nothing(fails_with: Any) -> None:
    stub = await fails_with(ValueError("secret"))
    error = await failure(stub.Retrieve(rag_pb2.RetrieveRequest()))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)


async def test_our_own_internal_error_keeps_its_id(fails_with: Any) -> None:
    stub = await fails_with(ValueError(f"{INTERNAL_MESSAGE} under id 7 of this replica"))
    error = await failure(stub.Retrieve(rag_pb2.RetrieveRequest()))
    assert error.details() == f"{INTERNAL_MESSAGE} under id 7 of this replica"


async def test_other_statuses_pass(fails_with: Any) -> None:
    stub = await fails_with(TimeoutError())
    assert (await failure(stub.Retrieve(rag_pb2.RetrieveRequest()))).code() is grpc.StatusCode.DEADLINE_EXCEEDED
