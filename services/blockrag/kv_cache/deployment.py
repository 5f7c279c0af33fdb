"""The cache as a Serve application: an ingress for what clients of gRPC ask, and shards that own the objects."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from blockrag.access import Access, Caller, show_own
from blockrag.configured import configured_bundle, configured_keys
from blockrag.grpc_status import rpc
from blockrag.kv_cache.block_requests import (
    block_forms,
    block_requests,
    check_pinned,
    document_ids,
    status_response,
    warm_response,
)
from blockrag.kv_cache.remote import APP, shard_group
from blockrag.kv_cache.shard_actor import KvCacheShard
from blockrag.kv_cache.shards import shard_names
from blockrag.limits import HEALTH_CHECKS, MIB, STORE_HEADROOM
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.v1 import kv_cache_pb2

_MAX_ONGOING = 1000
"""Requests in a shard. Most wait for an encode; what bounds them is the gateway's admission."""

_logger = logging.getLogger(__name__)


class KvCache:
    """Serves ``blockrag.v1.KvCacheService`` over all shards."""

    def __init__(self, settings: Settings, *shards: DeploymentHandle[Any]) -> None:
        setup_telemetry(APP, settings)
        self.access = Access(settings)
        bundle = configured_bundle(settings)
        self._keys = configured_keys(settings, bundle)
        self._chunk_tokens = bundle.chunk_tokens if bundle.refrag is not None else 0
        self._budget_bytes = settings.kv_cache.budget_mb * MIB
        names = shard_names(len(shards))
        self._shards = shard_group(names, dict(zip(names, shards, strict=True)).__getitem__)
        _warn_of_small_store(self._budget_bytes)

    @rpc
    async def GetKvCacheStatus(
        self, request: kv_cache_pb2.GetKvCacheStatusRequest, *, caller: Caller
    ) -> kv_cache_pb2.GetKvCacheStatusResponse:
        """Sums up the shards that answer in time, as far as the caller may see."""
        return show_own(status_response(await self._shards.stats(), self._budget_bytes), caller)

    @rpc
    async def WarmBlocks(self, request: kv_cache_pb2.WarmBlocksRequest) -> kv_cache_pb2.WarmBlocksResponse:
        """Encodes blocks ahead of time, in every form asked for."""
        forms = block_forms(request.forms, self._chunk_tokens)
        if request.pin:
            check_pinned(request.blocks)
        with span("warm_blocks", request.context, blocks=len(request.blocks), forms=len(forms)) as current:
            by_form = [block_requests(self._keys, request.context, request.blocks, form) for form in forms]
            outcome = await self._shards.warm(list(itertools.chain.from_iterable(by_form)), request.pin)
            response = warm_response(by_form, outcome)
            current.set(hits=response.hits, encoded=response.encoded)
        return response

    @rpc
    async def SetPins(self, request: kv_cache_pb2.SetPinsRequest) -> kv_cache_pb2.SetPinsResponse:
        """Pins or unpins documents' blocks in all shards."""
        documents = document_ids(request.context, request.documents)
        with span("set_pins", request.context, documents=len(documents)):
            return kv_cache_pb2.SetPinsResponse(blocks=await self._shards.set_pins(documents, request.pinned))

    @rpc
    async def PurgeDocuments(self, request: kv_cache_pb2.PurgeDocumentsRequest) -> kv_cache_pb2.PurgeDocumentsResponse:
        """Forgets documents' blocks in all shards; the decoders follow within their polling interval."""
        documents = document_ids(request.context, request.documents)
        with span("purge", request.context, documents=len(documents)):
            return kv_cache_pb2.PurgeDocumentsResponse(blocks=await self._shards.purge(documents))


def _warn_of_small_store(budget_bytes: int) -> None:
    resources: dict[str, float] = ray.cluster_resources()
    available = resources.get("object_store_memory", 0.0)
    if budget_bytes * STORE_HEADROOM > available:
        _logger.warning(
            "kv_cache.budget_mb is %d MiB and the cluster's object stores have %d MiB: past them blocks spill to disk; "
            "keep the budget under two thirds",
            budget_bytes // MIB,
            int(available) // MIB,
        )


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file."""
    settings = load_application_settings(args)
    shards = [
        serve.deployment(
            name=name,
            num_replicas=1,
            max_ongoing_requests=_MAX_ONGOING,
            **HEALTH_CHECKS,
            ray_actor_options={"num_cpus": 0.1},
        )(KvCacheShard).bind(name, settings)
        for name in shard_names(settings.kv_cache.shards)
    ]
    return serve.deployment(
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING,
        **HEALTH_CHECKS,
        ray_actor_options={"num_cpus": 0.1},
    )(KvCache).bind(settings, *shards)
