"""Where a plan is made: here, unless it needs the compressor.

A plan without compression is tokenising and adding up, 0.2 ms for passages that were seen before; asking another
replica for it takes ten times as long. What takes a policy, or long tokenising, is the compressor's: its replicas can
be scaled for it, and this event loop carries every client's stream.
"""

from __future__ import annotations

from typing import Protocol

from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageTokenizer
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse, PrepareQuestionRequest, PrepareQuestionResponse

MOST_UNKNOWN_CHARS = 8_192
"""Passage text that is tokenised here for one plan; takes about 2 ms."""


class PlanMaker(Protocol):
    """The part of the compressor that answering needs."""

    async def plan(self, request: PlanRequest) -> PlanResponse: ...

    async def prepare_question(self, request: PrepareQuestionRequest) -> PrepareQuestionResponse: ...


class NearPlanner:
    """Plans without the compressor where it can. Not thread-safe: it lives in one event loop."""

    def __init__(self, own: Planner, tokenizer: PassageTokenizer, compressor: PlanMaker) -> None:
        """``own`` plans with ``tokenizer``, which also remembers the compressor's results."""
        self._own = own
        self._tokenizer = tokenizer
        self._compressor = compressor

    async def plan(self, request: PlanRequest) -> PlanResponse:
        """Decides what enters the prompt. Raises what either planner raises."""
        without = request.compression.WhichOneof("budget") in (None, "off")
        if without and self._unknown_chars(request) <= MOST_UNKNOWN_CHARS:
            return await self._own.plan(request)
        response = await self._compressor.plan(request)
        for passage, planned in zip(request.passages, response.passages, strict=False):
            self._tokenizer.remember(passage.title, passage.text, planned.token_ids)
        return response

    async def prepare_question(self, request: PrepareQuestionRequest) -> PrepareQuestionResponse:
        """Has the compressor embed a question ahead of its plan."""
        return await self._compressor.prepare_question(request)

    def _unknown_chars(self, request: PlanRequest) -> int:
        return sum(
            len(passage.text)
            for passage in request.passages
            if not self._tokenizer.remembers(passage.title, passage.text)
        )
