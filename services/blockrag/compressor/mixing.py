"""Which chunks of which passages are expanded for one question: sizes, embeddings, policy, budget put together.

A plan under a latency budget must know the decoder's cost per slot (``ttft``) and the policy's own time, which is
measured here. Chunk embeddings are kept by the cache for the cluster, and here for the next plan.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockrag.aio import failed
from blockrag.budget import PrefillCost, Room, affordable_slots, chunk_lengths, expand, room_for
from blockrag.compressor.compression_request import RETRIEVAL, CompressionRequest
from blockrag.compressor.plans import Candidates, Mixture, by_passage, mixture_by_size
from blockrag.compressor.rating import ChunkRater
from blockrag.compressor.tokenizing import USUAL_TOKENS, counted_tokens
from blockrag.errors import DataError, InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import BlockSource
from blockrag.lru import Lru, remembering
from blockrag.recent import Recent
from blockrag.types import BlockForm, BlockRequest, CachedBlock, ChunkEmbeddings
from blockrag.v1 import compressor_pb2


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
        found = {key: held for key in keys if (held := self._held.get(key)) is not None}
        missing = {key: request(place) for place, key in enumerate(keys) if key not in found}
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


_REMEMBERED_KEYS = 16_384
_REMEMBERED_QUESTIONS = 256


class Mixer:
    """Makes mixtures for a bundle that can compress. All calls from one event loop.

    What takes more than about a millisecond, questions' embeddings and policies' logits, has its own thread.
    """

    def __init__(
        self,
        chunk_tokens: int,
        rater: ChunkRater,
        embeddings: EmbeddingCache,
        keys: KeyMaker,
        *,
        threads: int = 1,
    ) -> None:
        """``threads``: CPU threads of what is computed by torch."""
        self._chunk_tokens = chunk_tokens
        self._rater = rater
        self._embeddings = embeddings
        self._times = Recent()
        """What the policy took, by the number of chunks."""
        self._form = BlockForm("chunks", chunk_tokens)
        self._key = remembering(
            lambda tenant, ids: (keys.block_key(tenant, ids, self._form), len(ids)),
            _REMEMBERED_KEYS * USUAL_TOKENS,
            lambda made: counted_tokens(made[1]),
        )
        self._questions: Lru[tuple[int, ...], asyncio.Future[Tensor]] = Lru(_REMEMBERED_QUESTIONS)
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="compressor-policy", initializer=torch.set_num_threads, initargs=(threads,)
        )

    async def mix(
        self,
        request: compressor_pb2.PlanRequest,
        compression: CompressionRequest,
        candidates: Candidates,
        cost: PrefillCost | None = None,
    ) -> Mixture:
        """Decide under the request's budget; ``cost`` of a prefill, where that is a time.

        The policy is asked, and embeddings are fetched, only when the budget leaves a choice. Raises
        ``InvalidRequestError`` for a latency that the question alone takes, and what the cache raises.
        """
        sizes = [len(ids) for ids in candidates.blocks]
        policy = compression.policy
        if cost is not None:
            room, policy = self._timed_room(request, compression, candidates, sizes, cost)
        else:
            room = room_for(sizes, self._chunk_tokens, compression.kind, compression.limit, candidates.most_slots)
        if not room.choice or policy == RETRIEVAL:
            return mixture_by_size(room, sizes, self._chunk_tokens)
        kept = room.kept
        lengths = chunk_lengths([sizes[place] for place in kept], self._chunk_tokens)
        started = time.perf_counter()
        logits = await self._logits(request, policy, candidates, kept)
        policy_ms = 1000 * (time.perf_counter() - started)
        self._times.record(policy_ms, len(lengths))
        expanded = expand(logits, lengths, room.extra_slots)
        return Mixture(room.decisions, by_passage(expanded, sizes, kept, self._chunk_tokens), policy_ms)

    def _timed_room(
        self,
        request: compressor_pb2.PlanRequest,
        compression: CompressionRequest,
        candidates: Candidates,
        sizes: Sequence[int],
        cost: PrefillCost,
    ) -> tuple[Room, str]:
        """The room that a latency leaves, and who is to choose.

        Asking the policy takes time that slots cannot have. Where that would cost a passage, or all choice, retrieval
        chooses instead, which takes none.
        """

        def room(spent_ms: float) -> Room:
            before = candidates.instruction_tokens
            timed = affordable_slots(cost, compression.limit, spent_ms, before, request.margin_ms)
            return room_for(
                sizes, self._chunk_tokens, compression.kind, compression.limit, candidates.most_slots, timed
            )

        plain = room(request.spent_ms)
        if not plain.choice or compression.policy == RETRIEVAL:
            return plain, RETRIEVAL
        chunks = sum(map(self._form.size, sizes))
        try:
            asked = room(request.spent_ms + self._times.line().at(chunks))
        except InvalidRequestError:
            return plain, RETRIEVAL
        if asked.extra_slots == 0 or asked.decisions != plain.decisions:
            return plain, RETRIEVAL
        return asked, compression.policy

    async def _logits(
        self, request: compressor_pb2.PlanRequest, policy: str, candidates: Candidates, kept: Sequence[int]
    ) -> NDArray[np.float32]:
        blocks = [candidates.blocks[place] for place in kept]
        tenant = request.context.tenant
        keys = [self._key(tenant, ids)[0] for ids in blocks]

        def wanted(place: int) -> BlockRequest:
            document_id = candidates.document_ids[kept[place]]
            return BlockRequest(
                key=keys[place],
                token_ids=np.array(blocks[place], dtype=np.int32),
                tenant=tenant,
                # given passages have no document, and so belong to no collection
                collection=request.collection if document_id else "",
                document_id=document_id,
                traceparent=request.context.traceparent,
                form=self._form,
            )

        question = self._question(candidates.final_ids) if self._rater.sees_question(policy) else None
        embeddings = await self._embeddings.get(keys, wanted)
        asked = await question if question is not None else None
        ranks = [candidates.places[place] for place in kept]
        rate = partial(self._rater.rate, policy, blocks, embeddings, candidates.final_ids, asked, ranks)
        return await asyncio.get_running_loop().run_in_executor(self._executor, rate)

    async def prepare(self, final_ids: Sequence[int]) -> None:
        """Embed a question that will be planned for soon."""
        await self._question(final_ids)

    def _question(self, final_ids: Sequence[int]) -> Awaitable[Tensor]:
        """The question's chunk embeddings, under way or remembered."""
        ids = tuple(final_ids)
        known = self._questions.get(ids)
        if known is None or (known.done() and failed(known)):
            loop = asyncio.get_running_loop()
            known = loop.run_in_executor(self._executor, self._rater.embed_question, ids)
            known.add_done_callback(failed)
            self._questions.put(ids, known)
        # shielded: one who leaves must not take it from the others
        return asyncio.shield(known)
