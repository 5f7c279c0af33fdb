"""From block requests to blocks in memory: the L1 first, then one fetch for each block that is missing.

However many prompts of this replica want a missing block, it is fetched once; each of them waits for that fetch, and
a fetch that nobody waits for any more is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from blockrag.aio import SingleFlight
from blockrag.decoder.l1 import L1Cache, L1Entry
from blockrag.encoder.forms import FormEncoder
from blockrag.errors import DataError
from blockrag.kv_cache.shard_messages import BlockSource, FetchedBlock, Tier
from blockrag.types import BlockKV, BlockRequest, CachedBlock

if TYPE_CHECKING:
    from blockrag.modeling.model import SlotModel
    from blockrag.modeling.refrag.compression import ChunkCompressor
    from blockrag.modeling.slots import ResidentBlock

BlockTier = Literal["l1"] | Tier
"""Where a prompt's block was found."""
TIERS: tuple[BlockTier, ...] = ("l1", "store", "disk", "volume", "encoded")


class EncodingBlockSource:
    """Encodes blocks in this process: for a decoder without a cluster, in tests and benchmarks.

    ``SlotModel.encode`` shares nothing that changes with ``SlotModel.forward``, so the engine's model can be used.
    """

    def __init__(self, model: SlotModel, compressor: ChunkCompressor | None = None) -> None:
        """``compressor``: for compressed blocks; None where the bundle has none."""
        self._encoder = FormEncoder(model, compressor)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decoder-encode")

    async def fetch(self, requests: Sequence[BlockRequest]) -> list[FetchedBlock]:
        loop = asyncio.get_running_loop()
        blocks = await loop.run_in_executor(self._executor, self._encoder.encode, requests)
        return [FetchedBlock(block, "encoded") for block in blocks]

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        return ["encoded"] * len(keys)


@dataclass(frozen=True)
class LoadedBlocks:
    """A prompt's blocks, pinned in the L1 until ``BlockLoader.release``."""

    entries: tuple[L1Entry, ...] = ()
    tiers: tuple[BlockTier, ...] = ()
    """Where each was found."""

    def slots(self, tier: BlockTier) -> int:
        """Slots of the blocks that were found there."""
        found = zip(self.entries, self.tiers, strict=True)
        return sum(entry.block.num_slots for entry, of in found if of == tier)

    @property
    def blocks(self) -> tuple[ResidentBlock, ...]:
        """In the order of the prompt."""
        return tuple(entry.block for entry in self.entries)


class BlockLoader:
    """Brings blocks into the L1. All calls from one event loop."""

    def __init__(self, l1: L1Cache, source: BlockSource, to_resident: Callable[[BlockKV], ResidentBlock]) -> None:
        self._l1 = l1
        self._source = source
        self._to_resident = to_resident
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="decoder-blocks")
        self._flights: SingleFlight[tuple[ResidentBlock, Tier]] = SingleFlight()
        self._coming: list[set[str]] = []
        """Of each load that waits, the keys that may be kept."""

    async def load(self, requests: Sequence[BlockRequest], traceparent: str = "") -> LoadedBlocks:
        """The blocks of a prompt. When all are in the L1, this returns without giving up the event loop.

        ``traceparent`` goes with what is fetched, so that the work done elsewhere is seen in this request's trace.
        Raises what the source raises, and ``DataError`` for a block that is not what was asked for.
        """
        entries = self._l1.acquire([request.key for request in requests])
        tiers: list[BlockTier] = ["l1"] * len(entries)
        missing = {request.key: request for request, entry in zip(requests, entries, strict=True) if entry is None}
        if missing:
            may_stay = set(missing)
            self._coming.append(may_stay)
            try:
                fetched = await self._flights.run_all(missing, partial(self._fetch, missing, traceparent))
            except BaseException:
                self._l1.release(entry for entry in entries if entry is not None)
                raise
            finally:
                self._coming = [coming for coming in self._coming if coming is not may_stay]
            for place, request in enumerate(requests):
                if entries[place] is None:
                    block, tiers[place] = fetched[request.key]
                    entries[place] = self._l1.insert(block, listed=request.key in may_stay)
        return LoadedBlocks(tuple(entry for entry in entries if entry is not None), tuple(tiers))

    async def locate(self, keys: Sequence[str]) -> list[BlockTier]:
        """Where each block would come from now; nothing is touched."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._l1]
        elsewhere = dict(zip(missing, await self._source.locate(missing), strict=True)) if missing else {}
        return [elsewhere.get(key, "l1") for key in keys]

    def release(self, loaded: LoadedBlocks) -> None:
        """Unpin a prompt's blocks; from any thread."""
        self._l1.release(loaded.entries)

    def purge(self, keys: Iterable[str]) -> None:
        """Forget blocks, those on their way included."""
        wanted = set(keys)
        self._l1.purge(wanted)
        self._forget(wanted)

    def clear(self) -> None:
        """Forget all blocks, those on their way included."""
        self._l1.clear()
        self._forget(set().union(*self._coming))

    def _forget(self, keys: set[str]) -> None:
        # Those that wait already get the block for their own prompt; it is not kept, and later prompts fetch anew.
        for coming in self._coming:
            coming -= keys
        for key in keys:
            self._flights.forget(key)

    async def _fetch(
        self, requests: dict[str, BlockRequest], traceparent: str, keys: Sequence[str]
    ) -> dict[str, tuple[ResidentBlock, Tier]]:
        new = [replace(requests[key], traceparent=traceparent) for key in keys]
        fetched = await self._source.fetch(new)
        blocks = [_checked(request, item.block) for request, item in zip(new, fetched, strict=True)]
        loop = asyncio.get_running_loop()
        residents = await loop.run_in_executor(self._executor, lambda: list(map(self._to_resident, blocks)))
        return {block.key: (block, item.tier) for block, item in zip(residents, fetched, strict=True)}


def _checked(request: BlockRequest, block: CachedBlock) -> BlockKV:
    if not isinstance(block, BlockKV) or block.key != request.key or block.num_slots != request.size:
        raise DataError(f"the cache answered block {request.key} with another one")
    return block
