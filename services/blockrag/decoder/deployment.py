"""The decoder as a Serve application.

Who starts the system imports this too, to build the application: torch and the model come with the replica alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from blockrag.access import Access, Caller, show_own
from blockrag.configured import configured_bundle, configured_device, token_bytes
from blockrag.grpc_status import rpc
from blockrag.handles import DecoderClient
from blockrag.kv_cache.fetching import follow_purges
from blockrag.kv_cache.remote import connect
from blockrag.limits import HEALTH_CHECKS, MIB
from blockrag.scaling import replicas_between
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry
from blockrag.v1 import decoder_pb2

_SWITCH_INTERVAL_S = 0.0005
"""Longest wait of the event loop for the interpreter lock while the engine computes; Python's own is 5 ms."""


class Decoder:
    """Serves ``blockrag.v1.DecoderService``."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        import torch

        from blockrag.decoder.costs import measure_costs
        from blockrag.decoder.service import assemble, check_engine, warm_up
        from blockrag.modeling.model import SlotModel

        setup_telemetry("decoder", settings)
        self.access = Access(settings)
        torch.set_num_threads(settings.decoder.threads)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        bundle = configured_bundle(settings, verify_files=True)
        device = configured_device(settings, granted=bool(ray.get_gpu_ids()))
        model = SlotModel.load(bundle, device=device)
        warm_up(model)
        cache = connect(settings)
        self._service = assemble(bundle, model, cache, settings)
        self._check_engine = partial(check_engine, self._service.engine, settings.decoder.max_step_s)
        measure_costs(model, self._service.meters)
        self._service.engine.start()
        self._upkeep = asyncio.get_running_loop().create_task(follow_purges(cache, self._service.loader, self._keep_up))

    @rpc
    async def Decode(self, request: decoder_pb2.DecodeRequest) -> AsyncGenerator[decoder_pb2.DecodeResponse, None]:
        """Streams the answer to a planned prompt; closing the stream stops the work."""
        async with aclosing(self._service.decode(request)) as messages:
            async for message in messages:
                yield message

    @rpc
    async def EstimatePrefill(self, request: decoder_pb2.EstimatePrefillRequest) -> decoder_pb2.EstimatePrefillResponse:
        """Says what a first token would take."""
        return await self._service.estimate(request)

    @rpc
    async def GetDecoderStatus(
        self, request: decoder_pb2.GetDecoderStatusRequest, *, caller: Caller
    ) -> decoder_pb2.GetDecoderStatusResponse:
        """Describes this replica, as far as the caller may see."""
        return show_own(self._service.status(), caller)

    async def check_health(self) -> None:
        """Has Serve replace a replica whose engine or upkeep ended, or whose engine hangs in a step."""
        self._check_engine()
        if self._upkeep.done():
            raise RuntimeError("the upkeep task ended")

    def __del__(self) -> None:
        service = getattr(self, "_service", None)
        if service is not None:
            service.engine.stop()

    def _keep_up(self) -> None:
        self._service.l1.expire()
        self._service.record_gauges()


class DecoderDoor:
    """What callers of gRPC reach where there are several decoders.

    A deployment of its own, because Serve refuses a router of one's own on an ingress behind HAProxy. The gateway asks
    the decoders themselves.
    """

    def __init__(self, decoders: DeploymentHandle[Any], settings: Settings) -> None:
        setup_telemetry("decoder", settings)
        self.access = Access(settings)
        self._decoders = DecoderClient(lambda _: decoders)

    @rpc
    async def Decode(self, request: decoder_pb2.DecodeRequest) -> AsyncGenerator[decoder_pb2.DecodeResponse, None]:
        """As in ``Decoder``."""
        async with aclosing(self._decoders.decode(request)) as messages:
            async for message in messages:
                yield message

    @rpc
    async def EstimatePrefill(self, request: decoder_pb2.EstimatePrefillRequest) -> decoder_pb2.EstimatePrefillResponse:
        """By the decoder that would be asked for these blocks, as far as is known here."""
        return await self._decoders.estimate_prefill(request)

    @rpc
    async def GetDecoderStatus(
        self, request: decoder_pb2.GetDecoderStatusRequest, *, caller: Caller
    ) -> decoder_pb2.GetDecoderStatusResponse:
        """Of one of the decoders."""
        return show_own(await self._decoders.status(), caller)


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    decoder = settings.decoder
    options: dict[str, Any] = {
        # Above what is admitted: one request too many must reach the engine to be refused, not wait in a queue.
        "max_ongoing_requests": 2 * (decoder.max_sequences + decoder.max_waiting) + 64,
        **HEALTH_CHECKS,
    }
    actor = {"num_cpus": decoder.num_cpus, "num_gpus": decoder.num_gpus}
    most = max(decoder.replicas, decoder.max_replicas)
    several = most > 1 and decoder.routing == "blocks"
    if several:
        size = token_bytes(configured_bundle(settings), settings)
        options["request_router_config"] = {
            "request_router_class": "blockrag.decoder.routing.AffinityRouter",
            "request_router_kwargs": {
                "held_tokens": decoder.l1_mb * MIB // size,
                "stored_tokens": settings.cluster.object_store_mb * MIB // size,
            },
        }
    scaling = replicas_between(decoder.replicas, most, decoder.target_ongoing_requests, settings)
    decoders = serve.deployment(ray_actor_options=actor, **scaling, **options)(Decoder)
    if not several:
        return decoders.bind(settings)
    del options["request_router_config"]
    return serve.deployment(ray_actor_options={"num_cpus": 0.1}, **options)(DecoderDoor).bind(
        decoders.bind(settings), settings
    )
