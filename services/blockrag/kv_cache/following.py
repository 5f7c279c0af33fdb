"""Following the cache's purges: what a replica keeps for itself forgets changed and deleted documents too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from blockrag.kv_cache.messages import PurgeLog

PERIOD_S = 1.0
"""How often purges are asked for."""

_logger = logging.getLogger(__name__)


class PurgeSource(Protocol):
    """Who tells what was purged: ``KvCacheClient``."""

    async def poll_purges(self) -> PurgeLog:
        """Keys purged since the last call."""
        ...


class Purgeable(Protocol):
    """Copies of blocks by key, those on their way included."""

    def purge(self, keys: Iterable[str]) -> None:
        """Forget some."""
        ...

    def clear(self) -> None:
        """Forget all."""
        ...


async def follow_purges(
    source: PurgeSource, copies: Purgeable, then: Callable[[], None] | None = None, *, period_s: float = PERIOD_S
) -> None:
    """Have ``copies`` forget what was purged, each ``period_s`` seconds and until it is cancelled.

    ``then`` is called after each time. What fails is logged and tried again.
    """
    while True:
        await asyncio.sleep(period_s)
        try:
            purged = await source.poll_purges()
            if purged.reset:
                copies.clear()
            elif purged.keys:
                copies.purge(purged.keys)
        except Exception:
            _logger.exception("asking for purges failed; it is tried again")
        if then is not None:
            try:
                then()
            except Exception:
                _logger.exception("upkeep failed; it is tried again")
