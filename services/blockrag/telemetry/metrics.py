"""Prometheus metrics through Ray's metrics agent, which prefixes their names with ``ray_``.

Outside Ray nothing is recorded. A metric is made when it is first used, because making one needs a running worker.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Buckets of OpenTelemetry's ``gen_ai.server.time_to_first_token``, in seconds."""


class _Metric:
    """A metric by name; tags are given by keyword at each record, all of those declared."""

    _more: tuple[Any, ...] = ()
    """What Ray is told between description and tags."""

    def __init__(self, name: str, description: str, tags: Sequence[str] = ()) -> None:
        self.name = name
        self.description = description
        self.tags = tuple(tags)
        self._inner: Any = None

    def _record(self, how: str, value: float, tags: dict[str, str]) -> None:
        """Has Ray's metric do it; nothing outside Ray."""
        if self._inner is None:
            if "ray" not in sys.modules:
                return
            import ray

            if not ray.is_initialized():
                return
            from ray.util import metrics

            made = getattr(metrics, type(self).__name__)
            self._inner = made(self.name, self.description, *self._more, self.tags)
        getattr(self._inner, how)(value, tags=tags)


class Counter(_Metric):
    """Only grows."""

    def inc(self, value: float = 1.0, **tags: str) -> None:
        """Adds ``value``; nothing at 0."""
        if value > 0:
            self._record("inc", value, tags)


class Gauge(_Metric):
    """The latest value."""

    def set(self, value: float, **tags: str) -> None:
        """Replaces the value."""
        self._record("set", value, tags)


class Histogram(_Metric):
    """A distribution."""

    def __init__(
        self, name: str, description: str, tags: Sequence[str] = (), buckets: Sequence[float] = LATENCY_BUCKETS_S
    ) -> None:
        super().__init__(name, description, tags)
        self._more = (list(buckets),)

    def observe(self, value: float, **tags: str) -> None:
        """Counts one value, in seconds where the buckets are."""
        self._record("observe", value, tags)


TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "blockrag_time_to_first_token_seconds", "From the request's arrival to its first text.", ("attention_mode",)
)
INTER_TOKEN_LATENCY_SECONDS = Histogram(
    "blockrag_inter_token_latency_seconds", "Between an answer's tokens.", ("attention_mode",)
)
E2E_REQUEST_LATENCY_SECONDS = Histogram(
    "blockrag_e2e_request_latency_seconds", "From the request's arrival to its end.", ("method",)
)
STAGE_SECONDS = Histogram("blockrag_stage_seconds", "Time of each stage of an answer.", ("stage",))
REQUESTS = Counter("blockrag_requests", "Finished requests by gRPC status.", ("method", "status", "tenant"))
ADMISSION_REJECTIONS = Counter(
    "blockrag_admission_rejections", "Requests refused because as many were under way.", ("method", "tenant")
)
PROMPT_TOKENS = Counter("blockrag_prompt_tokens", "Slots of prompts, cached ones too.", ("attention_mode",))
PROMPT_TOKENS_CACHED = Counter("blockrag_prompt_tokens_cached", "Of them, read from a cache.", ("attention_mode",))
NUM_REQUESTS_RUNNING = Gauge("blockrag_num_requests_running", "Requests being worked on.", ("service",))
NUM_REQUESTS_WAITING = Gauge("blockrag_num_requests_waiting", "Requests waiting to be worked on.", ("service",))
KV_CACHE_USAGE_PERC = Gauge("blockrag_kv_cache_usage_perc", "Used share of a tier's bytes, 0 to 1.", ("tier",))
KV_CACHE_QUERY_TOKENS = Counter("blockrag_kv_cache_query_tokens", "Tokens looked up in a tier.", ("tier",))
KV_CACHE_HIT_TOKENS = Counter("blockrag_kv_cache_hit_tokens", "Tokens found in a tier (l1, store, disk).", ("tier",))
ENCODED_TOKENS = Counter("blockrag_encoded_tokens", "Tokens encoded as blocks.")
GENERATED_TOKENS = Counter("blockrag_generated_tokens", "Tokens generated.", ("attention_mode",))
