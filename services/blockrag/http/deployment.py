"""The HTTP door as a Serve application."""

from __future__ import annotations

from fastapi import FastAPI
from google.protobuf.empty_pb2 import Empty
from ray import serve
from ray.serve import Application

from blockrag.grpc_status import rpc
from blockrag.http.app import build_app
from blockrag.http.door import RemoteGateway
from blockrag.settings import Settings, host_and_port, load_application_settings
from blockrag.telemetry import setup_telemetry

_ALL_ADDRESSES = ("0.0.0.0", "::", "")


@serve.ingress()
class Http:
    """Answers OpenAI's clients by asking the gateway."""

    def __init__(self, settings: Settings, gateway: str = "gateway") -> None:
        """``gateway``: name of its application."""
        setup_telemetry("http", settings)
        cluster = settings.cluster
        host = "127.0.0.1" if cluster.host in _ALL_ADDRESSES else cluster.host
        target = host_and_port(host, cluster.grpc_port)
        self._app = build_app(RemoteGateway(serve.get_app_handle, target, gateway), settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    @rpc
    async def Answer(self, request: Empty) -> Empty:
        """Says that the replica answers, through its handle."""
        return request


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    # Above what the gateway admits: one request too many must reach it to be refused with a time to come back.
    ongoing = settings.gateway.max_inflight * settings.gateway.replicas * 2 + 64
    return serve.deployment(
        num_replicas=settings.http.replicas,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        ray_actor_options={"num_cpus": 0.1},
    )(Http).bind(settings)
