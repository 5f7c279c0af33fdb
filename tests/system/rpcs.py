"""Every method of every gRPC service, from the descriptors, and calls of it that look at nothing but bytes."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import blockrag.v1
from blockrag.services import SERVICES
from blockrag.status import LOST_STATUS

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Rpc:
    """One method."""

    application: str
    service: str
    method: str
    request: type[Message]
    response: type[Message]
    client_streaming: bool
    server_streaming: bool

    @property
    def path(self) -> str:
        """As HTTP/2 names it."""
        return f"/blockrag.v1.{self.service}/{self.method}"


@dataclass
class Outcome:
    """What came of a call."""

    code: grpc.StatusCode
    details: str = ""
    messages: list[bytes] = field(default_factory=list)


def all_rpcs() -> list[Rpc]:
    """All of the protocol, in the order of their names. Raises LookupError for a service that no application has."""
    applications = {name: service.name for service in SERVICES for name in service.protobuf}
    found = []
    for module in pkgutil.iter_modules(blockrag.v1.__path__):
        if not module.name.endswith("_pb2"):
            continue
        descriptor = importlib.import_module(f"blockrag.v1.{module.name}").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            if service.name not in applications:
                raise LookupError(f"no application answers {service.name}")
            for method in service.methods:
                found.append(
                    Rpc(
                        applications[service.name],
                        service.name,
                        method.name,
                        GetMessageClass(method.input_type),
                        GetMessageClass(method.output_type),
                        method.client_streaming,
                        method.server_streaming,
                    )
                )
    return sorted(found, key=lambda rpc: rpc.path)


async def call(
    channel: grpc.aio.Channel,
    rpc: Rpc,
    *messages: bytes,
    metadata: Metadata = (),
    timeout_s: float = 30.0,
    pause_s: float = 0.0,
    cancel_after_s: float | None = None,
) -> Outcome:
    """Sends messages, ``pause_s`` apart where the method takes a stream, and receives whatever comes.

    ``cancel_after_s``: leaves then, if it is not over. A call whose status gRPC lost on this side counts as cancelled.
    Raises what gRPC itself refuses to send (``ValueError``…).
    """
    sent = (("application", rpc.application), *metadata)
    outcome = Outcome(grpc.StatusCode.OK)
    running: Any

    async def stream() -> AsyncIterator[bytes]:
        for message in messages:
            yield message
            await asyncio.sleep(pause_s)

    async def receive() -> None:
        if rpc.server_streaming:
            async for message in running:
                outcome.messages.append(message)
        else:
            outcome.messages.append(await running)

    options: dict[str, Any] = {"metadata": sent, "timeout": timeout_s}
    if rpc.client_streaming:
        made: Any = channel.stream_stream if rpc.server_streaming else channel.stream_unary
        running = made(rpc.path)(stream(), **options)
    else:
        made = channel.unary_stream if rpc.server_streaming else channel.unary_unary
        running = made(rpc.path)(messages[0], **options)
    try:
        await asyncio.wait_for(receive(), cancel_after_s)
    except grpc.aio.AioRpcError as error:
        outcome.code, outcome.details = error.code(), error.details() or ""
        if (outcome.code, outcome.details) == LOST_STATUS:
            outcome.code = grpc.StatusCode.CANCELLED
    except TimeoutError:
        running.cancel()
        outcome.code = grpc.StatusCode.CANCELLED
    except asyncio.CancelledError:
        if not running.cancelled():
            raise
        outcome.code = grpc.StatusCode.CANCELLED
    return outcome
