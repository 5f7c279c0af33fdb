"""The standard health protocol, ``grpc.health.v1``, over the applications that run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockrag.services import SERVICES

APPLICATION_OF_SERVICE: dict[str, str] = {
    "": "gateway",
    **{f"blockrag.v1.{name}": service.name for service in SERVICES for name in service.protobuf},
}
"""The Serve application behind each protobuf service; the empty name is the protocol's "server as a whole"."""

FRESH_S = 1.0
"""How long an answer of the controller's is used."""
_WATCH_S = 1.0


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers Check and Watch.

    ``serving`` gives the names of the applications that can take requests; it may block.
    """

    def __init__(self, serving: Callable[[], frozenset[str]], fresh_s: float = FRESH_S) -> None:
        self._serving = serving
        self._fresh_s = fresh_s
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
                self._known_until = time.monotonic() + self._fresh_s
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
