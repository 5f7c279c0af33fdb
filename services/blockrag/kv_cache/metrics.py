"""The cache's metrics, around the shard instead of between its lines."""

from __future__ import annotations

from collections.abc import Sequence

from blockrag.kv_cache.messages import AcquiredBlock, ShardStats
from blockrag.telemetry.metrics import (
    KV_CACHE_HIT_TOKENS,
    KV_CACHE_QUERY_TOKENS,
    KV_CACHE_USAGE_PERC,
    Counter,
    Gauge,
)
from blockrag.types import BlockRequest

_TIER = "store"

KV_CACHE_BYTES = Gauge("blockrag_kv_cache_bytes", "Bytes of block KV that a shard holds.", ("shard",))
KV_CACHE_EVICTIONS = Counter("blockrag_kv_cache_evictions", "Blocks removed to make room.", ("shard",))
KV_CACHE_EXPIRATIONS = Counter("blockrag_kv_cache_expirations", "Blocks removed for their age.", ("shard",))
KV_CACHE_LOST = Counter("blockrag_kv_cache_lost", "Blocks whose objects the store lost.", ("shard",))
KV_CACHE_JOINED = Counter("blockrag_kv_cache_joined", "Requests that waited for another's encode.", ("shard",))


class ShardMetrics:
    """One shard's metrics; counters advance by what the shard's own counters have grown."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._last: ShardStats | None = None

    def record_acquired(self, requests: Sequence[BlockRequest], acquired: Sequence[AcquiredBlock]) -> None:
        """Counts the tokens looked up and found."""
        sizes = [int(request.token_ids.size) for request in requests]
        hits = sum(size for size, block in zip(sizes, acquired, strict=True) if block.tier == "store")
        KV_CACHE_QUERY_TOKENS.inc(sum(sizes), tier=_TIER)
        KV_CACHE_HIT_TOKENS.inc(hits, tier=_TIER)

    def record_stats(self, stats: ShardStats) -> None:
        """Brings gauges and counters up to date."""
        last, self._last = self._last, stats
        KV_CACHE_BYTES.set(stats.nbytes, shard=self._shard)
        KV_CACHE_USAGE_PERC.set(stats.nbytes / stats.budget_bytes, tier=_TIER)
        for counter, now, before in (
            (KV_CACHE_EVICTIONS, stats.evictions, last.evictions if last else 0),
            (KV_CACHE_EXPIRATIONS, stats.expirations, last.expirations if last else 0),
            (KV_CACHE_LOST, stats.lost, last.lost if last else 0),
            (KV_CACHE_JOINED, stats.joined, last.joined if last else 0),
        ):
            counter.inc(now - before, shard=self._shard)
