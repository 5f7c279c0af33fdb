"""The compressor as a Serve application."""

from __future__ import annotations

import asyncio

from ray import serve
from ray.serve import Application

from blockrag.access import Access
from blockrag.compressor.assembly import assemble, embedding_cache
from blockrag.configured import configured_bundle
from blockrag.grpc_status import rpc
from blockrag.handles import DecoderClient
from blockrag.kv_cache.fetching import follow_purges
from blockrag.kv_cache.remote import connect, connect_shards
from blockrag.limits import HEALTH_CHECKS
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.v1 import compressor_pb2


class Compressor:
    """Serves ``blockrag.v1.CompressorService``."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        setup_telemetry("compressor", settings)
        self.access = Access(settings)
        bundle = configured_bundle(settings)
        embeddings = None
        self._upkeep: asyncio.Task[None] | None = None
        if bundle.refrag is not None:
            bundle = configured_bundle(settings, verify_files=True)
            cache = connect(settings)
            embeddings = embedding_cache(cache, settings)
            self._upkeep = asyncio.get_running_loop().create_task(follow_purges(cache, embeddings))
        timing = DecoderClient(serve.get_app_handle).estimate_prefill, connect_shards(settings)
        self._planner = assemble(bundle, settings, embeddings, timing=timing)

    @rpc
    async def Plan(self, request: compressor_pb2.PlanRequest) -> compressor_pb2.PlanResponse:
        """Decides what of each passage enters the prompt."""
        with span("plan", request.context, candidates=len(request.passages)) as current:
            response = await self._planner.plan(request)
            current.set(prompt_tokens=response.prompt_tokens, policy_ms=round(response.policy_ms, 2))
            return response

    @rpc
    async def PrepareQuestion(
        self, request: compressor_pb2.PrepareQuestionRequest
    ) -> compressor_pb2.PrepareQuestionResponse:
        """Embeds a question ahead of its plan."""
        with span("prepare_question", request.context):
            await self._planner.prepare(request.question)
        return compressor_pb2.PrepareQuestionResponse()

    @rpc
    async def TokenizePassages(
        self, request: compressor_pb2.TokenizePassagesRequest
    ) -> compressor_pb2.TokenizePassagesResponse:
        """Gives the passages' blocks without a question."""
        return self._planner.tokenize(request)

    async def check_health(self) -> None:
        """Has Serve replace a replica whose upkeep ended."""
        if self._upkeep is not None and self._upkeep.done():
            raise RuntimeError("the upkeep task ended")


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    return serve.deployment(
        num_replicas=settings.compressor.replicas,
        max_ongoing_requests=256,
        **HEALTH_CHECKS,
        ray_actor_options={"num_cpus": 0.1},
    )(Compressor).bind(settings)
