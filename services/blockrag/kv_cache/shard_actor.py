"""A cache shard as Ray runs it: owns the objects of its blocks, and has the encoder pool make what is missing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import serve
from ray.experimental import get_local_object_locations
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from blockrag.kv_cache.messages import AcquiredBlock, DocumentId, PurgeLog, ShardStats, WarmOutcome
from blockrag.kv_cache.metrics import ShardMetrics
from blockrag.kv_cache.objects import exists
from blockrag.kv_cache.remote import APP, translated
from blockrag.kv_cache.shard import CacheShard, EncodedObject
from blockrag.kv_cache.shards import Shard
from blockrag.kv_cache.store import BlockStore
from blockrag.limits import MIB
from blockrag.settings import Settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.types import BlockRequest, CachedBlock
from blockrag.v1 import common_pb2


class KvCacheShard:
    """Holds references to block KV. One replica: its objects live and die with its process."""

    def __init__(self, name: str, settings: Settings) -> None:
        setup_telemetry(APP, settings)
        cache = settings.kv_cache
        store = BlockStore(
            cache.budget_mb * MIB // cache.shards, tenant_share=cache.tenant_share, ttl_s=float(cache.ttl_s)
        )
        self._encoder: DeploymentHandle[Any] | None = None
        self._shard = CacheShard(store, self._encode)
        self._metrics = ShardMetrics(name)

    async def acquire(self, blocks: list[BlockRequest]) -> list[AcquiredBlock]:
        """References to the blocks, in order; what is missing is encoded."""
        traced = next((block for block in blocks if block.traceparent), None)
        if traced is not None:
            context = common_pb2.RequestContext(traceparent=traced.traceparent, tenant=traced.tenant)
            with span("kv_acquire", context, blocks=len(blocks)) as current:
                acquired = await self._shard.acquire(blocks)
                current.set(encoded=sum(block.tier == "encoded" for block in acquired))
        else:
            acquired = await self._shard.acquire(blocks)
        self._metrics.record_acquired(blocks, acquired)
        return acquired

    async def warm(self, blocks: list[BlockRequest], pin: bool) -> WarmOutcome:
        """Has blocks held ahead of time."""
        return await self._shard.warm(blocks, pin)

    async def report_lost(self, keys: list[str], generations: list[int] | None = None) -> int:
        """Forgets blocks whose objects could not be read."""
        return self._shard.report_lost(keys, generations)

    async def purged_since(self, cursor: int) -> PurgeLog:
        """Keys purged since a reader's cursor; the decoders poll it each second."""
        self._metrics.record_stats(self._shard.stats())
        return self._shard.purged_since(cursor)

    async def set_pins(self, documents: list[DocumentId], pinned: bool) -> int:
        """Pins or unpins documents' blocks."""
        return self._shard.set_pins(documents, pinned)

    async def purge(self, documents: list[DocumentId]) -> int:
        """Forgets documents' blocks."""
        return self._shard.purge(documents)

    async def stats(self) -> ShardStats:
        """What is held, and what happened since the start."""
        return self._shard.stats()

    async def _encode(self, request: BlockRequest) -> EncodedObject:
        """Has a block encoded. This process makes the call, so it owns the object, which outlives the encoder."""
        return await translated("encoder", self._encode_in_pool(request))

    async def _encode_in_pool(self, request: BlockRequest) -> EncodedObject:
        if self._encoder is None:
            self._encoder = serve.get_deployment_handle("EncoderPool", app_name="encoder").options(_by_reference=True)
        handle = self._encoder.options(session_id=request.key)
        response = cast("DeploymentResponse[CachedBlock]", handle.encode_block.remote(request))
        try:
            ref = await response._to_object_ref()
            await exists(ref)
            # The owner knows where the object is and how large; fetching it here would copy it between nodes.
            location = get_local_object_locations([ref]).get(ref, {})
            if not location.get("node_ids"):
                # An error, which is raised; or a block so small that Ray sent it along instead of storing it. Put by
                # this process it is in the object store and needs no other process to stay.
                block = await ref
                return EncodedObject(ray.put(block), block.nbytes + block.token_ids.nbytes)
        except asyncio.CancelledError:
            response.cancel()
            raise
        return EncodedObject(ref, int(location["object_size"]))


if TYPE_CHECKING:
    _is_a_shard: type[Shard] = KvCacheShard
