"""What Serve's gRPC servers are given to listen for.

Serve imports these functions in its proxies and in the replicas of every ingress, so this module stays light.
Server reflection needs nothing here: ``gRPCOptions.enable_reflection`` is on by default and lists all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockrag.gateway.discreet import DiscreetHandlers
from blockrag.gateway.health import HealthServicer, serving_applications
from blockrag.grpc_status import MalformedRequest
from blockrag.v1 import (
    compressor_pb2_grpc,
    corpus_pb2_grpc,
    decoder_pb2_grpc,
    encoder_pb2_grpc,
    kv_cache_pb2_grpc,
    rag_pb2_grpc,
    retriever_pb2_grpc,
    system_pb2_grpc,
)

GRPC_SERVICER_FUNCTIONS: tuple[str, ...] = tuple(
    f"blockrag.gateway.servicers.add_{name}_to_server"
    for name in (
        "rag", "corpus", "system", "retriever", "encoder", "kv_cache", "compressor", "decoder", "health",
    )
)  # fmt: skip
"""Import strings for ``grpc_options.grpc_servicer_functions``."""


def add_rag_to_server(servicer: object, server: Any) -> None:
    """Adds ``RagService``."""
    _add(rag_pb2_grpc.add_RagServiceServicer_to_server, servicer, server)


def add_corpus_to_server(servicer: object, server: Any) -> None:
    """Adds ``CorpusService``."""
    _add(corpus_pb2_grpc.add_CorpusServiceServicer_to_server, servicer, server)


def add_system_to_server(servicer: object, server: Any) -> None:
    """Adds ``SystemService``."""
    _add(system_pb2_grpc.add_SystemServiceServicer_to_server, servicer, server)


def add_retriever_to_server(servicer: object, server: Any) -> None:
    """Adds ``RetrieverService``."""
    _add(retriever_pb2_grpc.add_RetrieverServiceServicer_to_server, servicer, server)


def add_encoder_to_server(servicer: object, server: Any) -> None:
    """Adds ``EncoderService``."""
    _add(encoder_pb2_grpc.add_EncoderServiceServicer_to_server, servicer, server)


def add_kv_cache_to_server(servicer: object, server: Any) -> None:
    """Adds ``KvCacheService``."""
    _add(kv_cache_pb2_grpc.add_KvCacheServiceServicer_to_server, servicer, server)


def add_compressor_to_server(servicer: object, server: Any) -> None:
    """Adds ``CompressorService``."""
    _add(compressor_pb2_grpc.add_CompressorServiceServicer_to_server, servicer, server)


def add_decoder_to_server(servicer: object, server: Any) -> None:
    """Adds ``DecoderService``."""
    _add(decoder_pb2_grpc.add_DecoderServiceServicer_to_server, servicer, server)


def add_health_to_server(servicer: object, server: Any) -> None:
    """Adds ``grpc.health.v1.Health``, to be answered by the server itself and not by a replica."""
    if hasattr(server, "add_passthrough_service"):
        server.add_passthrough_service(health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(serving_applications), server)


def _add(add_generated: Callable[..., None], servicer: object, server: Any) -> None:
    factory = getattr(server, "service_handler_factory", None)
    if factory is not None and not isinstance(factory, DiscreetHandlers):
        server.service_handler_factory = DiscreetHandlers(factory)
    add_generated(servicer, _ForgivingServer(server))


class _ForgivingServer:
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
