"""What Serve's gRPC servers are given to listen for.

Serve imports the function in its proxies and in the replicas of every ingress, so this module stays light.
Server reflection needs nothing here: ``gRPCOptions.enable_reflection`` is on by default and lists all of them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockrag.gateway.discreet import DiscreetHandlers
from blockrag.gateway.health import HealthServicer, serving_applications
from blockrag.grpc_status import MalformedRequest
from blockrag.services import SERVICES


def add_services_to_server(servicer: object, server: Any) -> None:
    """Adds every service of the registry, and ``grpc.health.v1.Health``."""
    factory = getattr(server, "service_handler_factory", None)
    if factory is not None and not isinstance(factory, DiscreetHandlers):
        server.service_handler_factory = DiscreetHandlers(factory)
    forgiving = ForgivingServer(server)
    for name in sorted(name for service in SERVICES for name in service.protobuf):
        add = _generated(name)
        add(servicer, forgiving)
    _add_health(server)


def _generated(name: str) -> Callable[[object, Any], None]:
    """The generated function that adds a protobuf service to a server."""
    module = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Service")).lower()
    stubs = importlib.import_module(f"blockrag.v1.{module}_pb2_grpc")
    return getattr(stubs, f"add_{name}Servicer_to_server")  # type: ignore[no-any-return]


def _add_health(server: Any) -> None:
    """Adds the health service, to be answered by the server itself and not by a replica."""
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
