"""Which passages can be read in time, by where their blocks are and what having and reading them takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from blockrag.budget import InTime, passages_in_time
from blockrag.compressor.decoder_costs import DecoderCosts
from blockrag.errors import BlockragError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import Tier, WarmOutcome
from blockrag.types import BlockRequest
from blockrag.v1.compressor_pb2 import PlanRequest

_LONGEST_PAUSE_S = 2.0
"""Until blocks that came too late are encoded. Far below what a deleted document's leftovers are left."""
_LOCATE_S = 0.2
_MOST_ENCODING = 8
"""Questions whose blocks are encoded afterwards at a time; others' are encoded when they are asked for again."""

_logger = logging.getLogger(__name__)


class BlockPlaces(Protocol):
    """The cache's shards, as far as plans need them."""

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        """Where each block would come from now."""
        ...

    async def warm(self, blocks: Sequence[BlockRequest], pin: bool) -> WarmOutcome:
        """Has blocks held ahead of time."""
        ...


class Timely:
    """Chooses among a request's passages. All calls from one event loop."""

    def __init__(self, costs: DecoderCosts, places: BlockPlaces, keys: KeyMaker) -> None:
        self._costs = costs
        self._places = places
        self._keys = keys
        self._encoding: set[asyncio.Task[None]] = set()

    async def choose(
        self,
        request: PlanRequest,
        max_ttft_ms: float,
        blocks: Sequence[Sequence[int]],
        least_slots: Sequence[int],
        before_tokens: int,
    ) -> InTime:
        """Which passages a time leaves, of these ``blocks``, that take ``least_slots`` each behind ``before_tokens``.

        Blocks that would have to be encoded and are left for it are encoded afterwards, for the next question. Raises
        ``UnavailableError`` while the decoder has told no cost.
        """
        cost = await self._costs.current()
        keys = [self._keys.block_key(request.context.tenant, ids) for ids in blocks]
        tiers = await self._located(keys)
        left_ms = max_ttft_ms - request.spent_ms - cost.base_ms - cost.slot_ms * before_tokens
        chosen = passages_in_time(list(map(len, blocks)), least_slots, tiers, cost, left_ms)
        late = [
            BlockRequest(
                key=keys[place],
                token_ids=np.array(blocks[place], dtype=np.int32),
                tenant=request.context.tenant,
                collection=request.collection if passage.document_id else "",
                document_id=passage.document_id,
            )
            for place, passage in enumerate(request.passages)
            if tiers[place] == "encoded" and not chosen.decisions[place].in_prompt
        ]
        if late and len(self._encoding) < _MOST_ENCODING:
            encoding = asyncio.get_running_loop().create_task(self._encode_later(late, max_ttft_ms / 1000))
            self._encoding.add(encoding)
            encoding.add_done_callback(self._encoding.discard)
        return chosen

    async def expected_ms(self, spent_ms: float, slots: int) -> float:
        """Time to first token of a prompt with so many cached slots, after ``spent_ms``."""
        cost = await self._costs.current()
        return spent_ms + cost.base_ms + cost.slot_ms * slots

    async def _located(self, keys: Sequence[str]) -> Sequence[Tier]:
        try:
            async with asyncio.timeout(_LOCATE_S):
                return await self._places.locate(keys)
        except (BlockragError, TimeoutError) as error:
            _logger.warning("where blocks are was not told, they are taken for cached: %s", error)
            return ["store"] * len(keys)

    async def _encode_later(self, blocks: Sequence[BlockRequest], pause_s: float) -> None:
        await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))  # the answer's own prefill goes first
        try:
            await self._places.warm(blocks, False)
        except BlockragError as error:
            _logger.warning("blocks that came too late were not encoded: %s", error)
