"""Which chunks of which passages are expanded for one question: sizes, embeddings, policy, budget put together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from blockrag.compressor.compression import RETRIEVAL, CompressionRequest
from blockrag.compressor.costs import DecoderCosts
from blockrag.compressor.embeddings import EmbeddingCache
from blockrag.compressor.expansion import affordable_slots, chunk_lengths, expand, retrieval_logits, room_for
from blockrag.compressor.planning import PassageDecision
from blockrag.compressor.rating import ChunkRater
from blockrag.keys import KeyMaker
from blockrag.types import BlockForm, BlockRequest
from blockrag.v1 import compressor_pb2


@dataclass(frozen=True)
class Candidates:
    """What a question's plan is made of."""

    blocks: Sequence[tuple[int, ...]]
    """Token ids of the passages' blocks, best first."""
    document_ids: Sequence[str]
    instruction_tokens: int
    final_ids: Sequence[int]
    most_slots: int
    """What the model and the request let passages take in any case."""


@dataclass(frozen=True)
class Mixture:
    """What becomes of the candidates."""

    decisions: list[PassageDecision]
    expanded: list[NDArray[np.bool_]]
    """Of the chunks of each passage that is in the prompt; no rows for one that is dropped."""


class Mixer:
    """Makes mixtures for a bundle that can compress. All calls from one event loop; the policy has its own thread."""

    def __init__(
        self,
        chunk_tokens: int,
        rater: ChunkRater,
        embeddings: EmbeddingCache,
        keys: KeyMaker,
        costs: DecoderCosts,
        *,
        threads: int = 1,
    ) -> None:
        """``threads``: CPU threads of the policy."""
        self._chunk_tokens = chunk_tokens
        self._rater = rater
        self._embeddings = embeddings
        self._keys = keys
        self._costs = costs
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="compressor-policy", initializer=torch.set_num_threads, initargs=(threads,)
        )

    async def mix(
        self, request: compressor_pb2.PlanRequest, compression: CompressionRequest, candidates: Candidates
    ) -> Mixture:
        """Decide under the request's budget.

        The policy is asked, and embeddings are fetched, only when the budget leaves a choice. Raises
        ``InvalidRequestError`` for a latency that the question alone takes, and what the cache and the decoder raise.
        """
        sizes = [len(ids) for ids in candidates.blocks]
        timed = 0
        if compression.kind == "max_ttft_ms":
            cost = await self._costs.current()
            timed = affordable_slots(cost, compression.limit, request.spent_ms, candidates.instruction_tokens)
        room = room_for(sizes, self._chunk_tokens, compression, candidates.most_slots, timed)
        kept = [place for place, decision in enumerate(room.decisions) if decision.in_prompt]
        lengths = chunk_lengths([sizes[place] for place in kept], self._chunk_tokens)
        if room.everything:
            expanded = np.ones(len(lengths), dtype=np.bool_)
        elif room.extra_slots == 0:
            expanded = np.zeros(len(lengths), dtype=np.bool_)
        else:
            logits = await self._logits(request, compression.policy, candidates, kept)
            expanded = expand(logits, lengths, room.extra_slots)
        return Mixture(room.decisions, self._by_passage(expanded, sizes, kept))

    async def _logits(
        self, request: compressor_pb2.PlanRequest, policy: str, candidates: Candidates, kept: Sequence[int]
    ) -> NDArray[np.float32]:
        blocks = [candidates.blocks[place] for place in kept]
        if policy == RETRIEVAL:
            return retrieval_logits([len(ids) for ids in blocks], self._chunk_tokens)
        embeddings = await self._embeddings.get(
            [self._wanted(request, candidates.blocks[place], candidates.document_ids[place]) for place in kept]
        )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, self._rater.rate, policy, blocks, embeddings, candidates.final_ids, kept
        )

    def _wanted(self, request: compressor_pb2.PlanRequest, ids: tuple[int, ...], document_id: str) -> BlockRequest:
        form = BlockForm("chunks", self._chunk_tokens)
        token_ids = np.array(ids, dtype=np.int32)
        return BlockRequest(
            key=self._keys.block_key(request.context.tenant, token_ids, form),
            token_ids=token_ids,
            tenant=request.context.tenant,
            # given passages have no document, and so belong to no collection
            collection=request.collection if document_id else "",
            document_id=document_id,
            traceparent=request.context.traceparent,
            form=form,
        )

    def _by_passage(
        self, expanded: NDArray[np.bool_], sizes: Sequence[int], kept: Sequence[int]
    ) -> list[NDArray[np.bool_]]:
        form = BlockForm("chunks", self._chunk_tokens)
        ends = np.cumsum([form.size(sizes[place]) for place in kept], dtype=np.int64)
        parts = dict(zip(kept, np.split(expanded, ends[:-1]), strict=True)) if kept else {}
        return [parts.get(place, np.zeros(0, dtype=np.bool_)) for place in range(len(sizes))]
