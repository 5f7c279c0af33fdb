"""Where a question's blocks are, for plans that know what having them takes."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blockrag.errors import BlockragError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import Tier, WarmOutcome
from blockrag.types import BlockForm, BlockRequest
from blockrag.v1.compressor_pb2 import PlanRequest

_LONGEST_PAUSE_S = 2.0
"""Until blocks that came too late are brought into memory. Far below what a deleted document's leftovers are left."""
_LOCATE_S = 0.2
_MOST_WARMING = 8
"""Questions whose blocks are brought into memory afterwards at a time; others' wait until they are asked for again."""

_logger = logging.getLogger(__name__)


class BlockPlaces(Protocol):
    """The cache's shards, as far as plans need them."""

    async def locate(self, keys: Sequence[str], within_s: float) -> list[Tier]:
        """Where each block would come from now."""
        ...

    async def warm(self, blocks: Sequence[BlockRequest], pin: bool) -> WarmOutcome:
        """Has blocks held ahead of time."""
        ...


@dataclass(frozen=True)
class Located:
    """Where a question's blocks are."""

    passages: list[tuple[Tier, ...]]
    """Of each passage, in each form."""
    before: Counter[str]
    """Slots by tier of the blocks that stand before them."""

    def slots(self, sizes: Sequence[int], read: Sequence[bool]) -> Counter[str]:
        """By tier, of those passages of ``sizes`` that are ``read``, and of what stands before them."""
        found = Counter(self.before)
        for size, tiers in itertools.compress(zip(sizes, self.passages, strict=True), read):
            for tier in tiers:
                found[tier] += size
        return found


class Timely:
    """Looks for blocks, and has late ones brought into memory for the next question. All calls from one event loop."""

    def __init__(self, places: BlockPlaces, keys: KeyMaker, forms: Sequence[BlockForm]) -> None:
        """``forms``: in which passages may be read."""
        self._places = places
        self._keys = keys
        self._forms = tuple(forms)
        self._warming: set[asyncio.Task[None]] = set()

    async def locate(self, tenant: str, passages: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> Located:
        """Of blocks by their token ids; what no shard tells in time is taken for held."""
        keys = [self._keys.block_key(tenant, ids) for ids in before]
        keys += [self._keys.block_key(tenant, ids, form) for ids in passages for form in self._forms]
        tiers = await self._places.locate(keys, _LOCATE_S)
        earlier = Counter[str]()
        for ids, tier in zip(before, tiers, strict=False):
            earlier[tier] += len(ids)
        found, forms = tiers[len(before) :], len(self._forms)
        return Located([tuple(found[place : place + forms]) for place in range(0, len(found), forms)], earlier)

    def warm_later(
        self, request: PlanRequest, passages: Sequence[Sequence[int]], places: Iterable[int], pause_s: float
    ) -> None:
        """Has these of the request's passages brought into memory, when the answer's own prefill should be over.

        Passages without a document are not: nothing would ever purge them there.
        """
        blocks = [
            BlockRequest(
                key=self._keys.block_key(request.context.tenant, passages[place], form),
                token_ids=np.array(passages[place], dtype=np.int32),
                tenant=request.context.tenant,
                collection=request.collection,
                document_id=request.passages[place].document_id,
                form=form,
            )
            for place in places
            if request.passages[place].document_id
            for form in self._forms
        ]
        if blocks and len(self._warming) < _MOST_WARMING:
            # a context of its own: it goes on after the request, whose end is none of it
            warming = asyncio.get_running_loop().create_task(
                self._warm(blocks, min(pause_s, _LONGEST_PAUSE_S)), context=contextvars.Context()
            )
            self._warming.add(warming)
            warming.add_done_callback(self._warming.discard)

    async def _warm(self, blocks: Sequence[BlockRequest], pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        try:
            await self._places.warm(blocks, False)
        except BlockragError as error:
            _logger.warning("blocks that came too late were not brought into memory: %s", error)
