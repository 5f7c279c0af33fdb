"""What a prefill costs on the decoder: asked for every few seconds while somebody plans under a latency budget."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable

from blockrag.alike import alike
from blockrag.budget import FetchCost, PrefillCost
from blockrag.errors import BlockragError, UnavailableError
from blockrag.v1 import decoder_pb2

FRESH_S = 5.0
"""A cost this old is asked for again, beside the plan that uses it."""

_logger = logging.getLogger(__name__)


class DecoderCosts:
    """The latest answer of a decoder. All calls from one event loop."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[decoder_pb2.GetDecoderStatusResponse]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._cost: PrefillCost | None = None
        self._asked = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def current(self) -> PrefillCost:
        """The cost; only the first call waits for the decoder. Raises ``UnavailableError`` when it has none to tell."""
        if self._asking is None and (self._cost is None or self._clock() - self._asked > FRESH_S):
            # a context of its own: a request that is given up must not take the answer from the others
            loop = asyncio.get_running_loop()
            self._asking = loop.create_task(self._refresh(), context=contextvars.Context())
        if self._cost is None and self._asking is not None:
            # shielded: one who leaves must not take the answer from the others
            await asyncio.shield(self._asking)
        if self._cost is None:
            raise UnavailableError("decoder: it has measured no prefill yet; ask again, or without max_ttft_ms")
        return self._cost

    async def _refresh(self) -> None:
        try:
            status = await self._ask()
            if status.measured_prefills:
                fetches = tuple(alike(FetchCost, each) for each in status.fetches)
                self._cost = PrefillCost(status.prefill_base_ms, status.prefill_slot_ms, fetches)
                self._asked = self._clock()
        except BlockragError as error:
            _logger.warning("the decoder's cost per slot could not be asked for: %s", error)
        finally:
            self._asking = None
