"""Blocks that were in an encoder when it went away: one of them may be what it died of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from blockrag.errors import DataError, ReplicaLostError
from blockrag.lru import Lru

QUARANTINE_S = 60.0
"""How long a block is not encoded that took two encoders with it."""
_STRIKES = 2
_REMEMBERED = 4096


class Suspects:
    """Counts encoders that were lost with a block, and refuses the block after the second.

    A forward pass holds many blocks, and all of them are suspected when it ends its process. So suspected blocks are
    tried one at a time in this shard: who survives that is cleared, and of those that were together the first time one
    at most is held guilty with each further encoder. An encoder that was killed for another reason costs its blocks one
    strike; a block that meets two of them by chance is held back for a minute.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._strikes: Lru[str, tuple[int, float]] = Lru(_REMEMBERED)
        self._alone = asyncio.Lock()

    @asynccontextmanager
    async def tried(self, key: str) -> AsyncGenerator[None, None]:
        """Around one try to encode the block. Raises ``DataError`` for one that is in quarantine."""
        alone: AbstractAsyncContextManager[None] = self._alone if self._count(key) else nullcontext()
        async with alone:
            if self._count(key) >= _STRIKES:
                raise DataError(
                    f"block {key} was in {_STRIKES} encoders when they died; it is tried again after {QUARANTINE_S:g} s"
                )
            try:
                yield
            except ReplicaLostError:
                self._strikes.put(key, (self._count(key) + 1, self._clock()))
                raise
            else:
                self._strikes.pop(key)

    def _count(self, key: str) -> int:
        strikes, struck = self._strikes.get(key) or (0, 0.0)
        return strikes if self._clock() - struck < QUARANTINE_S else 0
