"""Settings → index and embedder: all wiring of the retriever."""

from __future__ import annotations

from pathlib import Path

from blockrag.errors import SettingsError
from blockrag.retriever.base import EmbeddingInfo, VectorIndex
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.embedding import Embedder, find_embedding
from blockrag.retriever.quotas import LimitsOf, no_limits
from blockrag.retriever.service import RetrieverService
from blockrag.settings import Settings


def check_settings(settings: Settings) -> None:
    """Raises ``SettingsError`` for what no retriever can run with; cheap enough for ``build``."""
    retriever = settings.retriever
    if retriever.backend == "edge" and retriever.replicas > 1:
        raise SettingsError("retriever.replicas: the embedded index serves one replica; set retriever.backend: server")
    if retriever.backend == "server" and not retriever.url:
        raise SettingsError("retriever.url: must name the Qdrant server when retriever.backend is server")
    find_embedding(retriever.embedding_model)


def open_index(settings: Settings, embedding: EmbeddingInfo) -> VectorIndex:
    """The index that the settings choose; it connects or opens files when first used."""
    retriever = settings.retriever
    if retriever.backend == "server":
        from blockrag.retriever.server import ServerIndex  # its client is nothing to the embedded index

        return ServerIndex.connect(retriever.url, retriever.api_key, embedding)
    path = Path(retriever.path).expanduser() if retriever.path else settings.state_path / "index"
    return EdgeIndex(path, embedding)


def open_service(settings: Settings, limits_of: LimitsOf = no_limits) -> RetrieverService:
    """Loads the embedding model and opens the index. ``limits_of``: what a tenant may store."""
    check_settings(settings)
    embedder = Embedder(find_embedding(settings.retriever.embedding_model))
    return RetrieverService(open_index(settings, embedder.info), embedder, settings.retriever, limits_of)
