"""What a question's prompt takes until its first token, for plans that have a time for it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from blockrag.aio import detached
from blockrag.alike import alike
from blockrag.budget import FetchCost, PrefillCost
from blockrag.errors import BlockragError, UnavailableError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shards import ShardGroup
from blockrag.types import FULL, BlockForm, BlockRequest
from blockrag.v1.common_pb2 import CHUNK_FORM_COMPRESSED, PromptBlock, RequestContext
from blockrag.v1.compressor_pb2 import PlanRequest
from blockrag.v1.decoder_pb2 import EstimatePrefillRequest, EstimatePrefillResponse

_LONGEST_PAUSE_S = 2.0
"""Until blocks that came too late are brought into memory. Far below what a deleted document's leftovers are left."""
_MOST_WARMING = 8
"""Questions whose blocks are brought into memory afterwards at a time; others' wait until they are asked for again."""

_logger = logging.getLogger(__name__)


Estimate = Callable[[EstimatePrefillRequest], Awaitable[EstimatePrefillResponse]]
"""Asks a decoder where blocks are, and what it takes to have and to read them."""


@dataclass(frozen=True)
class TtftEstimate:
    """What a question's prompt takes."""

    cost: PrefillCost
    passages: list[tuple[str, ...]]
    """Where each one's block is, in each form."""
    before: Counter[str]
    """Tokens by tier of the blocks that stand before them."""

    def fetch_ms(self, sizes: Sequence[int], read: Sequence[bool]) -> float:
        """To have those passages of ``sizes`` that are ``read``, and what stands before them."""
        tokens = Counter(self.before)
        for size, tiers in itertools.compress(zip(sizes, self.passages, strict=True), read):
            for tier in tiers:
                tokens[tier] += size
        return self.cost.fetch_ms(tokens)


class TtftEstimator:
    """Asks where blocks are, and has late ones brought into memory for the next question. Of one event loop."""

    def __init__(self, estimate: Estimate, shards: ShardGroup, keys: KeyMaker, forms: Sequence[BlockForm]) -> None:
        """``forms``: in which passages may be read."""
        self._estimate = estimate
        self._shards = shards
        self._keys = keys
        self._forms = tuple(forms)
        self._warming: set[asyncio.Task[None]] = set()

    async def estimate(
        self, context: RequestContext, passages: Sequence[Sequence[int]], before: Sequence[Sequence[int]]
    ) -> TtftEstimate:
        """Of blocks by their token ids. Raises ``UnavailableError`` while no prefill was measured, and what the
        decoder raises."""
        request = EstimatePrefillRequest(context=context, blocks=[PromptBlock(token_ids=ids) for ids in before])
        request.blocks.extend(_in_form(ids, form) for ids in passages for form in self._forms)
        told = await self._estimate(request)
        if not told.measured_prefills:
            raise UnavailableError("decoder: it has measured no prefill yet; ask again, or without max_ttft_ms")
        tiers, forms = list(told.tiers), len(self._forms)
        earlier = Counter[str]()
        for ids, tier in zip(before, tiers, strict=False):
            earlier[tier] += len(ids)
        found = [tuple(tiers[place : place + forms]) for place in range(len(before), len(tiers), forms)]
        fetches = tuple(alike(FetchCost, each) for each in told.fetches)
        return TtftEstimate(PrefillCost(told.base_ms, told.slot_ms, fetches), found, earlier)

    def warm_later(
        self, request: PlanRequest, passages: Sequence[Sequence[int]], places: Iterable[int], pause_s: float
    ) -> None:
        """Has these of the request's passages brought into memory, when the answer's own prefill should be over.

        Passages without a document are not: nothing would ever purge them there.
        """
        blocks = [
            self._keys.block_request(
                request.context.tenant, passages[place], form, collection=request.collection, document_id=document_id
            )
            for place in places
            if (document_id := request.passages[place].document_id)
            for form in self._forms
        ]
        if blocks and len(self._warming) < _MOST_WARMING:
            warming = detached(self._warm(blocks, min(pause_s, _LONGEST_PAUSE_S)))
            self._warming.add(warming)
            warming.add_done_callback(self._warming.discard)

    async def _warm(self, blocks: Sequence[BlockRequest], pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        try:
            await self._shards.warm(blocks, False)
        except BlockragError as error:
            _logger.warning("blocks that came too late were not brought into memory: %s", error)


def _in_form(ids: Sequence[int], form: BlockForm) -> PromptBlock:
    block = PromptBlock(token_ids=ids)
    if form != FULL:
        block.chunk_tokens = form.chunk_tokens
        block.forms.extend([CHUNK_FORM_COMPRESSED] * form.size(len(ids)))
    return block
