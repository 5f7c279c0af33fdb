"""What Serve's gRPC servers are given to listen for.

Serve imports these functions in its proxies and in the replicas of every ingress, so this module stays light.
Server reflection needs nothing here: ``gRPCOptions.enable_reflection`` is on by default and lists all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

GRPC_SERVICER_FUNCTIONS: tuple[str, ...] = (
    "blockrag.v1.rag_pb2_grpc.add_RagServiceServicer_to_server",
    "blockrag.v1.corpus_pb2_grpc.add_CorpusServiceServicer_to_server",
    "blockrag.v1.system_pb2_grpc.add_SystemServiceServicer_to_server",
    "blockrag.v1.retriever_pb2_grpc.add_RetrieverServiceServicer_to_server",
    "blockrag.v1.encoder_pb2_grpc.add_EncoderServiceServicer_to_server",
    "blockrag.v1.kv_cache_pb2_grpc.add_KvCacheServiceServicer_to_server",
    "blockrag.v1.compressor_pb2_grpc.add_CompressorServiceServicer_to_server",
    "blockrag.v1.decoder_pb2_grpc.add_DecoderServiceServicer_to_server",
    "blockrag.gateway.servicers.add_health_to_server",
)
"""Import strings for ``grpc_options.grpc_servicer_functions``."""

APPLICATION_OF_SERVICE: dict[str, str] = {
    "": "gateway",
    "blockrag.v1.RagService": "gateway",
    "blockrag.v1.CorpusService": "gateway",
    "blockrag.v1.SystemService": "gateway",
    "blockrag.v1.RetrieverService": "retriever",
    "blockrag.v1.EncoderService": "encoder",
    "blockrag.v1.KvCacheService": "kv_cache",
    "blockrag.v1.CompressorService": "compressor",
    "blockrag.v1.DecoderService": "decoder",
}
"""The Serve application behind each protobuf service; the empty name is the health protocol's "server as a whole"."""

_FRESH_S = 1.0
_WATCH_S = 1.0


def add_health_to_server(servicer: object, server: Any) -> None:
    """Adds ``grpc.health.v1.Health`` to one of Serve's gRPC servers, to be answered there and not by a replica."""
    if hasattr(server, "add_passthrough_service"):
        server.add_passthrough_service(health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(serving_applications), server)


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The standard health protocol over the applications that run.

    ``serving`` gives the names of the applications that can take requests; it may block, and its answer is kept for a
    second.
    """

    def __init__(self, serving: Callable[[], frozenset[str]]) -> None:
        self._serving = serving
        self._known: frozenset[str] = frozenset()
        self._known_until = 0.0

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
        now = time.monotonic()
        if now >= self._known_until:
            # Set first: requests that come meanwhile take the last answer and do not ask as well.
            self._known_until = now + _FRESH_S
            self._known = await asyncio.to_thread(self._serving)
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
