"""Chunk embeddings that this replica has at hand: the cache keeps them for the cluster, this for the next plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from blockrag.errors import DataError
from blockrag.kv_cache.shard_messages import BlockSource
from blockrag.lru import Lru
from blockrag.types import BlockRequest, CachedBlock, ChunkEmbeddings


class EmbeddingCache:
    """Least recently used embeddings within a byte budget. All calls from one event loop.

    One prompt's embeddings may exceed the budget; then they are not kept.
    """

    def __init__(self, source: BlockSource, budget_bytes: int) -> None:
        self._source = source
        self._held: Lru[str, Tensor] = Lru(budget_bytes, lambda embeddings: embeddings.nbytes)
        self._coming: list[set[str]] = []
        """Of each fetch under way, the keys that may be kept."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._held.size

    async def get(self, keys: Sequence[str], request: Callable[[int], BlockRequest]) -> list[Tensor]:
        """Embeddings of each block, float32 [chunks, width], in order. When all are here, the loop is not given up.

        ``request`` makes the request for the block of ``keys[place]``, when it is missing. Raises what the source
        raises, and ``DataError`` for a block that is not what was asked for.
        """
        found: dict[str, Tensor] = {}
        missing: dict[str, BlockRequest] = {}
        for place, key in enumerate(keys):
            held = self._held.get(key)
            if held is None:
                missing[key] = request(place)
            else:
                found[key] = held
        if missing:
            found.update(await self._fetch(missing))
        return [found[key] for key in keys]

    def purge(self, keys: Iterable[str]) -> None:
        """Forget embeddings, those on their way included."""
        gone = set(keys)
        for coming in self._coming:
            coming -= gone
        for key in gone:
            self._held.pop(key)

    def clear(self) -> None:
        """Forget all embeddings, those on their way included."""
        for coming in self._coming:
            coming.clear()
        self._held.clear()

    async def _fetch(self, missing: dict[str, BlockRequest]) -> dict[str, Tensor]:
        may_stay = set(missing)
        self._coming.append(may_stay)
        try:
            fetched = await self._source.fetch(list(missing.values()))
        finally:
            self._coming = [coming for coming in self._coming if coming is not may_stay]
        found = {
            request.key: _embeddings(request, item.block)
            for request, item in zip(missing.values(), fetched, strict=True)
        }
        for key in may_stay:
            self._held.put(key, found[key])
        return found


def _embeddings(request: BlockRequest, block: CachedBlock) -> Tensor:
    if not isinstance(block, ChunkEmbeddings) or len(block.embeddings) != request.size:
        raise DataError(f"the cache answered chunk embeddings {request.key} with another block")
    # a copy: what comes from the object store is read-only, and stays there as long as somebody refers to it
    return torch.tensor(block.embeddings)
