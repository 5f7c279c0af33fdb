"""A cache shard as Ray runs it: owns the objects of its blocks, and has the encoder pool make what is missing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import serve
from ray.experimental import get_local_object_locations
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from blockrag.configured import configured_bundle, configured_keys
from blockrag.kv_cache.block_files import remove_all
from blockrag.kv_cache.disk import DiskTier
from blockrag.kv_cache.remote import APP, exists, read_objects, translated
from blockrag.kv_cache.shard import CacheShard, ShardMetrics
from blockrag.kv_cache.shard_messages import AcquiredBlock, EncodedObject, PurgeLog
from blockrag.kv_cache.shards import Shard, owner, shard_names
from blockrag.kv_cache.store import BlockStore
from blockrag.kv_cache.volume import Volume
from blockrag.kv_cache.volume_tier import VolumeTier
from blockrag.limits import MIB
from blockrag.settings import Settings
from blockrag.telemetry import setup_telemetry, span
from blockrag.types import BlockRequest, CachedBlock
from blockrag.v1 import common_pb2

_READ_TIMEOUT_S = 10.0
"""How long a writer of files waits for an object."""

_logger = logging.getLogger(__name__)


class KvCacheShard(CacheShard):
    """Holds references to block KV. One replica: its objects live and die with its process."""

    def __init__(self, name: str, settings: Settings) -> None:
        setup_telemetry(APP, settings)
        cache = settings.kv_cache
        store = BlockStore(
            cache.budget_mb * MIB // cache.shards, tenant_share=cache.tenant_share, ttl_s=float(cache.ttl_s)
        )
        volume = VolumeTier(Volume(cache.volume), put=_put, read=_read) if cache.volume else None
        super().__init__(store, self._have_encoded, disk=_disk_tier(name, settings), volume=volume)
        self._encoder: DeploymentHandle[Any] | None = None
        self._metrics = ShardMetrics(name)

    async def acquire(self, blocks: Sequence[BlockRequest]) -> list[AcquiredBlock]:
        """References to the blocks, in order; what is missing is encoded."""
        traced = next((block for block in blocks if block.traceparent), None)
        if traced is not None:
            context = common_pb2.RequestContext(traceparent=traced.traceparent, tenant=traced.tenant)
            with span("kv_acquire", context, blocks=len(blocks)) as current:
                acquired = await super().acquire(blocks)
                found = [block.tier for block in acquired]
                current.set(**{tier: found.count(tier) for tier in ("disk", "volume", "encoded")})
        else:
            acquired = await super().acquire(blocks)
        self._metrics.record_acquired(blocks, acquired)
        return acquired

    async def purged_since(self, cursor: int) -> PurgeLog:
        """Keys purged since a reader's cursor; the decoders poll it each second."""
        self._metrics.record_stats(await self.stats())
        return await super().purged_since(cursor)

    async def _have_encoded(self, request: BlockRequest) -> EncodedObject:
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
                return _put(block)
        except asyncio.CancelledError:
            response.cancel()
            raise
        return EncodedObject(ref, int(location["object_size"]))


def _put(block: CachedBlock) -> EncodedObject:
    return EncodedObject(ray.put(block), block.nbytes + block.token_ids.nbytes)


async def _read(ref: Any) -> CachedBlock | None:
    [block] = await read_objects([ref], _READ_TIMEOUT_S)
    return block


def _disk_tier(name: str, settings: Settings) -> DiskTier | None:
    cache = settings.kv_cache
    names = shard_names(cache.shards)
    if not cache.disk_mb:
        # What was written before must not come back, since nobody removes there what is purged from now on.
        try:
            remove_all(settings.disk_path)
        except OSError as error:
            _logger.warning("kv_cache.disk_mb is 0, and blocks are still in %s: %s", settings.disk_path, error)
        return None
    return DiskTier(
        settings.disk_path,
        cache.disk_mb * MIB // cache.shards,
        configured_keys(settings, configured_bundle(settings)),
        put=_put,
        read=_read,
        owns=lambda key: names[owner(key, names)] == name,
        shards=cache.shards,
        tenant_share=cache.tenant_share,
        ttl_s=float(cache.ttl_s),
    )


if TYPE_CHECKING:
    _is_a_shard: type[Shard] = KvCacheShard
