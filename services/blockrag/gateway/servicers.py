"""What Serve's gRPC servers are given to listen for, and what they tell nobody.

Serve turns the error of a dead actor into INTERNAL with its id, process, namespace and address in the text. To a client
that is a fault of the server which will not pass, and more than it should know: who it was is left out.

Serve imports the function in its proxies and in the replicas of every ingress, so this module stays light.
Server reflection needs nothing here: ``gRPCOptions.enable_reflection`` is on by default and lists all of them.
The standard health protocol, ``grpc.health.v1``, is answered over the applications that run.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockrag.grpc_status import INTERNAL_MESSAGE, MalformedRequest
from blockrag.services import SERVICES

APPLICATION_OF_SERVICE: dict[str, str] = {
    "": "gateway",
    **{f"blockrag.v1.{name}": service.name for service in SERVICES for name in service.protobuf},
}
"""The Serve application behind each protobuf service; the empty name is the protocol's "server as a whole"."""

FRESH_S = 1.0
"""How long an answer of the controller's is used."""
_WATCH_S = 1.0
LOST = "a replica that worked on this request went away; send it again"
# grpc.aio gives the code back as a number.
_INTERNAL = (grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL.value[0])
_RAY_S_WORDS = ("actor", "replica", "node", "worker", "raylet")

_logger = logging.getLogger(__name__)


def add_services_to_server(servicer: object, server: Any) -> None:
    """Adds every service of the registry, and ``grpc.health.v1.Health``."""
    factory = getattr(server, "service_handler_factory", None)
    if factory is not None and not isinstance(factory, DiscreetHandlers):
        server.service_handler_factory = DiscreetHandlers(factory)
    forgiving = ForgivingServer(server)
    for name in sorted(name for service in SERVICES for name in service.protobuf):
        module = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Service")).lower()
        stubs = importlib.import_module(f"blockrag.v1.{module}_pb2_grpc")
        getattr(stubs, f"add_{name}Servicer_to_server")(servicer, forgiving)
    # health is answered by the server itself and not by a replica
    if hasattr(server, "add_passthrough_service"):
        server.add_passthrough_service(health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(serving_applications), server)


class ForgivingServer:
    """A server as the generated code sees it, whose methods get a ``MalformedRequest`` for bytes that are no message.

    gRPC itself would answer UNKNOWN with the name of a Python class in it (seen for strings that are not UTF-8);
    ``rpc`` answers INVALID_ARGUMENT.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        for handler in handlers:
            # As Serve's own server does it: the handler's table has no public setter.
            handler._method_handlers = _forgiving(handler._method_handlers)
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: Mapping[str, Any]) -> None:
        self._server.add_registered_method_handlers(service_name, _forgiving(handlers))


def _forgiving(handlers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: handler._replace(request_deserializer=_forgiving_parser(handler.request_deserializer))
        for name, handler in handlers.items()
    }


def _forgiving_parser(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_say(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return MalformedRequest(str(error).split(": ", 1)[-1])

    return parse_or_say


class DiscreetHandlers:
    """Makes Serve's handlers, with contexts that keep to themselves what Ray says.

    Takes the place of ``gRPCGenericServer.service_handler_factory``.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]]) -> None:
        self._make = make

    def __call__(self, **options: Any) -> Callable[..., Any]:
        handler = self._make(**options)
        if inspect.isasyncgenfunction(handler):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                async with aclosing(handler(request, DiscreetContext(context))) as messages:
                    async for message in messages:
                        yield message

            return stream

        async def call(request: Any, context: Any) -> Any:
            return await handler(request, DiscreetContext(context))

        return call


class DiscreetContext:
    """A gRPC context on which an INTERNAL that is not of ours tells nothing of actors and addresses."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def set_details(self, details: str) -> None:
        """Called after ``set_code``, as Serve does."""
        if self._context.code() in _INTERNAL and not details.startswith(INTERNAL_MESSAGE):
            _logger.warning("kept from a client: %s", details)
            if any(word in details.lower() for word in _RAY_S_WORDS):
                self._context.set_code(grpc.StatusCode.UNAVAILABLE)
                details = LOST
            else:
                details = INTERNAL_MESSAGE
        self._context.set_details(details)


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers Check and Watch.

    ``serving`` gives the names of the applications that can take requests; it may block.
    """

    def __init__(self, serving: Callable[[], frozenset[str]]) -> None:
        self._serving = serving
        self._known: frozenset[str] = frozenset()
        self._known_until = 0.0
        self._asking: asyncio.Lock | None = None

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """SERVING or NOT_SERVING; NOT_FOUND for a service that is none of ours."""
        if request.service not in APPLICATION_OF_SERVICE:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service[:100]!r}")
        return health_pb2.HealthCheckResponse(status=await self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, and each change of it."""
        last = None
        while True:
            status = await self._status(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(_WATCH_S)

    async def _status(self, service: str) -> int:
        application = APPLICATION_OF_SERVICE.get(service)
        if application is None:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._asking is None:  # made here: a servicer is made before its event loop runs
            self._asking = asyncio.Lock()
        async with self._asking:
            if time.monotonic() >= self._known_until:
                self._known = await asyncio.to_thread(self._serving)
                self._known_until = time.monotonic() + FRESH_S
        serving = application in self._known
        return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING


def serving_applications() -> frozenset[str]:
    """Applications each of whose deployments has a running replica, as Serve's controller sees it."""
    from ray import serve

    return frozenset(
        name
        for name, application in serve.status().applications.items()
        if application.deployments
        and all(
            any(state == "RUNNING" and replicas > 0 for state, replicas in deployment.replica_states.items())
            for deployment in application.deployments.values()
        )
    )
