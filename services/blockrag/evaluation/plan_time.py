"""What a plan takes beside the call: the compressor's own work, in one process, for passages that it saw before.

Every plan is for a question of its own, which was embedded ahead as the gateway has it done while passages are
searched. Policies follow each other within a repeat, so that a change of the machine's speed meets them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockrag.compressor.assembly import assemble, embedding_cache
from blockrag.compressor.compression_request import RETRIEVAL
from blockrag.decoder.block_loading import EncodingBlockSource
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.results import GivenPassage
from blockrag.settings import Settings
from blockrag.simulation.scenario import percentile
from blockrag.v1.common_pb2 import ATTENTION_MODE_BLOCK, Compression, Passage, RequestContext
from blockrag.v1.compressor_pb2 import PlanRequest

OFF = "off"
"""Stands for a plan without compression."""
_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class PlanTime:
    """Milliseconds of plans by one policy."""

    policy: str
    """``off``, ``retrieval``, or one of the bundle's."""
    passages: int
    chunks: int
    median_ms: float
    p90_ms: float
    policy_ms: float
    """Median of the policy's own part."""
    repeats: int


async def measure_plans(
    bundle: Bundle,
    settings: Settings,
    passages: Sequence[GivenPassage],
    *,
    rate: float,
    repeats: int,
    warmup: int = 5,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[PlanTime]:
    """Times of plans for all of ``passages``, by policy; ``warmup`` repeats are run and not kept."""
    embeddings = None
    if bundle.refrag is not None:
        source = EncodingBlockSource(SlotModel.load(bundle), ChunkCompressor.load(bundle))
        embeddings = embedding_cache(source, settings)
    planner = assemble(bundle, settings, embeddings)
    policies = [OFF, *((RETRIEVAL, *sorted(bundle.refrag.policies)) if bundle.refrag is not None else ())]
    times: dict[str, list[tuple[float, float]]] = {policy: [] for policy in policies}
    chunks = 0
    for repeat in range(-warmup, repeats):
        for policy in policies:
            request = _request(passages, policy, rate, f"What is the largest city in the {repeat + warmup}th of them?")
            await planner.prepare(request.question)
            started = time.perf_counter()
            plan = await planner.plan(request)
            took_ms = 1000 * (time.perf_counter() - started)
            chunks = sum(len(planned.chunks) for planned in plan.passages)
            if repeat >= 0:
                times[policy].append((took_ms, plan.policy_ms))
        on_progress(repeat + warmup + 1, repeats + warmup)
    return [
        PlanTime(
            policy=policy,
            passages=len(passages),
            chunks=chunks,
            median_ms=round(statistics.median(took_ms for took_ms, _ in taken), 3),
            p90_ms=round(percentile([took_ms for took_ms, _ in taken], 0.9), 3),
            policy_ms=round(statistics.median(policy_ms for _, policy_ms in taken), 3),
            repeats=len(taken),
        )
        for policy, taken in times.items()
    ]


def _request(passages: Sequence[GivenPassage], policy: str, rate: float, question: str) -> PlanRequest:
    return PlanRequest(
        context=RequestContext(tenant="bench"),
        question=question,
        passages=[
            Passage(passage_id=f"{place}", document_id=f"{place}", title=given.title, text=given.text)
            for place, given in enumerate(passages)
        ],
        attention_mode=ATTENTION_MODE_BLOCK,
        max_tokens=_ANSWER_TOKENS,
        compression=Compression(rate=rate, policy=policy) if policy != OFF else None,
    )
