"""How many replicas a pool has."""

from __future__ import annotations

from typing import Any

from blockrag.settings import Settings

DRAIN_S = 120.0
"""How long a replica that is taken away may go on with what it has."""


def replicas_between(least: int, most: int, busy: int, settings: Settings) -> dict[str, Any]:
    """Options of a Serve deployment that has ``least`` replicas, and up to ``most`` while more than ``busy`` requests
    a replica are in progress."""
    if most <= least:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": busy,
            "upscale_delay_s": settings.cluster.upscale_delay_s,
            "downscale_delay_s": settings.cluster.downscale_delay_s,
        },
        "graceful_shutdown_timeout_s": DRAIN_S,
    }
