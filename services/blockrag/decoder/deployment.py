"""The decoder as a Serve application.

Who starts the system imports this too, to build the application: torch and the model come with the replica alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from functools import partial

import ray
from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext

from blockrag.access import Access, Caller, show_own
from blockrag.configured import configured_bundle, configured_device
from blockrag.grpc_status import rpc
from blockrag.kv_cache.following import follow_purges
from blockrag.kv_cache.remote import connect
from blockrag.limits import HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry
from blockrag.v1 import decoder_pb2

_SWITCH_INTERVAL_S = 0.0005
"""Longest wait of the event loop for the interpreter lock while the engine computes; Python's own is 5 ms."""


class Decoder:
    """Serves ``blockrag.v1.DecoderService``."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        import torch

        from blockrag.decoder.cost import measure_prefills
        from blockrag.decoder.runtime import assemble, check_engine, warm_up
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
        self._runtime = assemble(bundle, model, cache, settings)
        self._check_engine = partial(check_engine, self._runtime.engine, settings.decoder.max_step_s)
        measure_prefills(model, self._runtime.meter)
        self._runtime.engine.start()
        self._upkeep = asyncio.get_running_loop().create_task(follow_purges(cache, self._runtime.loader, self._keep_up))

    @rpc
    async def Decode(
        self, request: decoder_pb2.DecodeRequest, grpc_context: RayServegRPCContext | None = None
    ) -> AsyncGenerator[decoder_pb2.DecodeResponse, None]:
        """Streams the answer to a planned prompt; closing the stream stops the work."""
        messages = self._runtime.service.decode(request)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    @rpc
    async def GetDecoderStatus(
        self,
        request: decoder_pb2.GetDecoderStatusRequest,
        grpc_context: RayServegRPCContext | None = None,
        *,
        caller: Caller,
    ) -> decoder_pb2.GetDecoderStatusResponse:
        """Describes this replica, as far as the caller may see."""
        status = self._runtime.service.status()
        show_own(status, caller)
        return status

    async def check_health(self) -> None:
        """Has Serve replace a replica whose engine or upkeep ended, or whose engine hangs in a step."""
        self._check_engine()
        if self._upkeep.done():
            raise RuntimeError("the upkeep task ended")

    def __del__(self) -> None:
        runtime = getattr(self, "_runtime", None)
        if runtime is not None:
            runtime.engine.stop()

    def _keep_up(self) -> None:
        self._runtime.l1.expire()
        self._runtime.service.record_gauges()


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    decoder = settings.decoder
    return serve.deployment(
        num_replicas=decoder.replicas,
        # Above what is admitted: one request too many must reach the engine to be refused, not wait in a queue.
        max_ongoing_requests=2 * (decoder.max_sequences + decoder.max_waiting) + 64,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        ray_actor_options={"num_cpus": decoder.num_cpus, "num_gpus": decoder.num_gpus},
    )(Decoder).bind(settings)
