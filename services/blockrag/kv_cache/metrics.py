"""The cache's metrics, around the shard instead of between its lines."""

from __future__ import annotations

from collections.abc import Sequence

from blockrag.kv_cache.messages import AcquiredBlock, DiskUsage, ShardStats, Tier
from blockrag.telemetry.metrics import (
    KV_CACHE_HIT_TOKENS,
    KV_CACHE_QUERY_TOKENS,
    KV_CACHE_USAGE_PERC,
    Counter,
    Gauge,
)
from blockrag.types import BlockRequest

KV_CACHE_BYTES = Gauge("blockrag_kv_cache_bytes", "Bytes of block KV that a shard holds.", ("shard",))
KV_CACHE_EVICTIONS = Counter("blockrag_kv_cache_evictions", "Blocks removed to make room.", ("shard",))
KV_CACHE_EXPIRATIONS = Counter("blockrag_kv_cache_expirations", "Blocks removed for their age.", ("shard",))
KV_CACHE_LOST = Counter("blockrag_kv_cache_lost", "Blocks whose objects the store lost.", ("shard",))
KV_CACHE_JOINED = Counter("blockrag_kv_cache_joined", "Requests that waited for another's encode.", ("shard",))
KV_CACHE_DISK_BYTES = Gauge("blockrag_kv_cache_disk_bytes", "Bytes of disk that a shard's blocks take.", ("shard",))
KV_CACHE_DISK_EVICTIONS = Counter("blockrag_kv_cache_disk_evictions", "Files removed to make room.", ("shard",))
KV_CACHE_DISK_REJECTED = Counter(
    "blockrag_kv_cache_disk_rejected", "Files that were damaged or of another bundle.", ("shard",)
)
KV_CACHE_DISK_DROPPED = Counter(
    "blockrag_kv_cache_disk_dropped", "Blocks that the disk had no room or no time for.", ("shard",)
)


class ShardMetrics:
    """One shard's metrics; counters advance by what the shard's own counters have grown."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._last: ShardStats | None = None

    def record_acquired(self, requests: Sequence[BlockRequest], acquired: Sequence[AcquiredBlock]) -> None:
        """Counts the tokens looked up and found."""
        tokens: dict[Tier, int] = {"store": 0, "disk": 0, "encoded": 0}
        for request, block in zip(requests, acquired, strict=True):
            tokens[block.tier] += int(request.token_ids.size)
        KV_CACHE_QUERY_TOKENS.inc(sum(tokens.values()), tier="store")
        KV_CACHE_HIT_TOKENS.inc(tokens["store"], tier="store")
        KV_CACHE_QUERY_TOKENS.inc(tokens["disk"] + tokens["encoded"], tier="disk")
        KV_CACHE_HIT_TOKENS.inc(tokens["disk"], tier="disk")

    def record_stats(self, stats: ShardStats) -> None:
        """Brings gauges and counters up to date."""
        last, self._last = self._last, stats
        KV_CACHE_BYTES.set(stats.nbytes, shard=self._shard)
        KV_CACHE_USAGE_PERC.set(stats.nbytes / stats.budget_bytes, tier="store")
        disk, disk_before = stats.disk, last.disk if last else DiskUsage()
        KV_CACHE_DISK_BYTES.set(disk.nbytes, shard=self._shard)
        if disk.budget_bytes:
            KV_CACHE_USAGE_PERC.set(disk.nbytes / disk.budget_bytes, tier="disk")
        for counter, now, before in (
            (KV_CACHE_EVICTIONS, stats.evictions, last.evictions if last else 0),
            (KV_CACHE_EXPIRATIONS, stats.expirations, last.expirations if last else 0),
            (KV_CACHE_LOST, stats.lost, last.lost if last else 0),
            (KV_CACHE_JOINED, stats.joined, last.joined if last else 0),
            (KV_CACHE_DISK_EVICTIONS, disk.evictions, disk_before.evictions),
            (KV_CACHE_DISK_REJECTED, disk.rejected, disk_before.rejected),
            (KV_CACHE_DISK_DROPPED, disk.dropped, disk_before.dropped),
        ):
            counter.inc(now - before, shard=self._shard)
