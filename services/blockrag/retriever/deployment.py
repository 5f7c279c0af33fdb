"""The retriever as a Serve application."""

from __future__ import annotations

from ray import serve
from ray.serve import Application

from blockrag.access import Access
from blockrag.limits import HEALTH_CHECKS
from blockrag.retriever.embedding import Embedder, find_embedding
from blockrag.retriever.rpcs import RetrieverService, check_settings, open_index
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry


class Retriever(RetrieverService):
    """Serves ``blockrag.v1.RetrieverService``."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        import torch  # with the replica alone, not with who builds the application

        setup_telemetry("retriever", settings)
        self.access = Access(settings)
        torch.set_num_threads(settings.retriever.threads)
        embedder = Embedder(find_embedding(settings.retriever.embedding_model))
        super().__init__(open_index(settings, embedder.info), embedder, settings.retriever, self.access.limits)
        await self.start()


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file. Raises ``SettingsError``."""
    settings = load_application_settings(args)
    check_settings(settings)
    return serve.deployment(
        num_replicas=settings.retriever.replicas,
        max_ongoing_requests=256,
        **HEALTH_CHECKS,
        ray_actor_options={"num_cpus": 0.2},
    )(Retriever).bind(settings)
