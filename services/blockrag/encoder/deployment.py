"""The encoder pool as a Serve application: an ingress for clients of gRPC, and the pool that the cache calls.

They are two deployments because Serve refuses a router of one's own on an ingress behind HAProxy.
"""

from __future__ import annotations

from typing import Any, cast

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from blockrag.access import Access, Caller, show_own
from blockrag.encoder.pool import EncoderPool
from blockrag.grpc_status import rpc
from blockrag.limits import HEALTH_CHECKS
from blockrag.scaling import replicas_between
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry
from blockrag.v1 import encoder_pb2

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Encoder:
    """Serves ``blockrag.v1.EncoderService`` with one replica of the pool for each call."""

    def __init__(self, pool: DeploymentHandle[Any], settings: Settings) -> None:
        setup_telemetry("encoder", settings)
        self.access = Access(settings)
        self._pool = pool

    @rpc
    async def EncodeBlocks(self, request: encoder_pb2.EncodeBlocksRequest) -> encoder_pb2.EncodeBlocksResponse:
        """Encodes blocks and describes them."""
        return cast("encoder_pb2.EncodeBlocksResponse", await self._pool.encode_blocks.remote(request))

    @rpc
    async def GetEncoderStatus(
        self, request: encoder_pb2.GetEncoderStatusRequest, *, caller: Caller
    ) -> encoder_pb2.GetEncoderStatusResponse:
        """Describes a replica, as far as the caller may see."""
        return show_own(cast("encoder_pb2.GetEncoderStatusResponse", await self._pool.status.remote()), caller)


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    encoder = settings.encoder
    pool = serve.deployment(
        # Twice a full forward pass of short blocks may wait in a replica; the rest waits with its callers.
        max_ongoing_requests=max(64, 4 * encoder.target_ongoing_requests),
        **replicas_between(encoder.min_replicas, encoder.max_replicas, encoder.target_ongoing_requests, settings),
        request_router_config={"request_router_class": _ROUTER},
        **HEALTH_CHECKS,
        ray_actor_options={"num_cpus": encoder.num_cpus, "num_gpus": encoder.num_gpus},
    )(EncoderPool).bind(settings)
    ingress = serve.deployment(
        max_ongoing_requests=64,
        **HEALTH_CHECKS,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress(Encoder).bind(pool, settings)
