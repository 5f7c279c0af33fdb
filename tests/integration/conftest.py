"""One real system for all integration tests: Ray, Serve with its applications, gRPC and HTTP, a random bundle.

Contracts depend neither on what an answer says nor on what a compressed chunk does.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.local.local_system import ray_token_environment
from blockrag.local.preflight import free_port
from blockrag.modeling.bundle import load_bundle
from blockrag.settings import (
    BundleSettings,
    ClusterSettings,
    DecoderSettings,
    EncoderSettings,
    GatewaySettings,
    KvCacheSettings,
    Settings,
)
from tests.refrag_bundles import make_refrag_bundle

# Ray reads this when it is imported, which is why it is set here and Ray imported below.
os.environ["RAY_AUTH_MODE"] = "token"


@dataclass(frozen=True)
class Cluster:
    """The running system, as tests see it. This process is a driver of its Ray."""

    system: LocalSystem
    settings: Settings

    @property
    def target(self) -> str:
        """gRPC address, host:port."""
        return self.system.target


CHUNK_TOKENS = 8
"""Tokens of a chunk of the system's bundle."""


def cluster_settings(state_dir: Path, bundle: Path) -> Settings:
    """Small budgets, free ports, two cache shards."""
    return Settings(
        bundle=BundleSettings(path=str(bundle)),
        cluster=ClusterSettings(
            grpc_port=free_port(), http_port=free_port(), object_store_mb=256, state_dir=str(state_dir)
        ),
        gateway=GatewaySettings(max_inflight=32, max_top_k=50),
        kv_cache=KvCacheSettings(shards=2, budget_mb=96),
        encoder=EncoderSettings(min_replicas=1, max_replicas=1, threads=1),
        decoder=DecoderSettings(threads=1, l1_mb=64),
    )


@pytest.fixture(scope="session")
def cluster(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The system, started once and stopped at the end."""
    import ray

    bundle = make_refrag_bundle(
        load_bundle(small_bundle),
        tmp_path_factory.mktemp("bundle") / "compressing",
        width=64,
        chunk_tokens=CHUNK_TOKENS,
        decoder_width=256,
    )
    settings = cluster_settings(tmp_path_factory.mktemp("state"), bundle.path)
    with LocalSystem.start(settings, owned=True) as system:
        os.environ.update(ray_token_environment(settings))
        ray.init(address=system.ray_address, namespace="tests", log_to_driver=False)
        yield Cluster(system, settings)
        ray.shutdown()


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[BlockragClient]:
    """A client of the running system."""
    async with BlockragClient(cluster.target) as connected:
        yield connected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests; starting the cluster counts against the first test that uses it."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(300))
