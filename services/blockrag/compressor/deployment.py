"""The compressor as a Serve application."""

from __future__ import annotations

from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext

from blockrag.access import protect
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageTokenizer
from blockrag.configured import configured_bundle
from blockrag.grpc_status import translate_errors
from blockrag.settings import AppArgs, Settings, load_settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.v1 import compressor_pb2


class Compressor:
    """Serves ``blockrag.v1.CompressorService``."""

    def __init__(self, settings: Settings) -> None:
        setup_telemetry("compressor", settings)
        protect(settings)
        bundle = configured_bundle(settings)
        tokenizer = PassageTokenizer(bundle.load_tokenizer(), bundle.template)
        self._planner = Planner(tokenizer, bundle.max_context_tokens, settings.compressor.chunk_tokens)

    @translate_errors
    async def Plan(
        self, request: compressor_pb2.PlanRequest, grpc_context: RayServegRPCContext | None = None
    ) -> compressor_pb2.PlanResponse:
        """Decides what of each passage enters the prompt."""
        with span("plan", request.context, candidates=len(request.passages)) as current:
            response = self._planner.plan(request)
            current.set(prompt_tokens=response.prompt_tokens)
            return response

    @translate_errors
    async def TokenizePassages(
        self, request: compressor_pb2.TokenizePassagesRequest, grpc_context: RayServegRPCContext | None = None
    ) -> compressor_pb2.TokenizePassagesResponse:
        """Gives the passages' blocks without a question."""
        return self._planner.tokenize(request)


def build(args: AppArgs) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_settings(args.settings_file or None)
    return serve.deployment(
        num_replicas=settings.compressor.replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0.1},
    )(Compressor).bind(settings)
