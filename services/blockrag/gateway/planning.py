"""Where a plan is made: here, unless it needs the compressor.

A plan that follows from the passages' sizes is tokenising and adding up, 0.2 to 0.4 ms for passages that were seen
before; asking another replica for it takes ten times as long. What takes a policy, the decoder's measurements, or long
tokenising is the compressor's: its replicas can be scaled for it, and this event loop carries every client's stream.
"""

from __future__ import annotations

from typing import Protocol

from blockrag.compressor.compression import CompressionAbility, CompressionRequest, sizes_decide
from blockrag.compressor.drafts import PassageDrafts
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageTokenizer
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    CHUNK_FORM_COMPRESSED,
    AttentionMode,
    Passage,
    PromptBlock,
    Sampling,
)
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse, PrepareQuestionRequest, PrepareQuestionResponse
from blockrag.v1.decoder_pb2 import DecodeRequest

MOST_UNKNOWN_CHARS = 8_192
"""Passage text that is tokenised and described here for one plan; takes about 5 ms, three times that where the
vocabulary is not byte-level."""


class PlanMaker(Protocol):
    """The part of the compressor that planning needs."""

    async def plan(self, request: PlanRequest) -> PlanResponse: ...

    async def prepare_question(self, request: PrepareQuestionRequest) -> PrepareQuestionResponse: ...


class ReadPlanMaker(Protocol):
    """What answering needs: a maker of plans whose compression was read already, once for the whole gateway."""

    async def plan(self, request: PlanRequest, compression: CompressionRequest | None) -> PlanResponse: ...

    async def prepare_question(self, request: PrepareQuestionRequest) -> PrepareQuestionResponse: ...


class NearPlanner:
    """Plans without the compressor where it can. Not thread-safe: it lives in one event loop."""

    def __init__(
        self,
        own: Planner,
        tokenizer: PassageTokenizer,
        drafts: PassageDrafts,
        compressor: PlanMaker,
        ability: CompressionAbility,
    ) -> None:
        """``own`` plans with ``tokenizer`` and ``drafts``, which also remember the compressor's results.

        ``ability``: the bundle's.
        """
        self._own = own
        self._tokenizer = tokenizer
        self._drafts = drafts
        self._compressor = compressor
        self._ability = ability

    async def plan(self, request: PlanRequest, compression: CompressionRequest | None) -> PlanResponse:
        """Decides what enters the prompt. Raises what either planner raises.

        ``compression``: what the request's message was read as.
        """
        near = sizes_decide(compression, self._ability)
        worded = compression is not None and self._ability.policies is not None
        if near and self._unknown_chars(request, worded) <= MOST_UNKNOWN_CHARS:
            return await self._own.plan_read(request, compression)
        response = await self._compressor.plan(request)
        for passage, planned in zip(request.passages, response.passages, strict=False):
            self._tokenizer.remember(passage.title, passage.text, planned.token_ids)
            if near and worded:
                self._drafts.remember(planned)
        return response

    async def prepare_question(self, request: PrepareQuestionRequest) -> PrepareQuestionResponse:
        """Has the compressor embed a question ahead of its plan."""
        return await self._compressor.prepare_question(request)

    def _unknown_chars(self, request: PlanRequest, worded: bool) -> int:
        return sum(len(passage.text) for passage in request.passages if not self._knows(passage, worded))

    def _knows(self, passage: Passage, worded: bool) -> bool:
        """Whether a passage was tokenised before, and ``worded``: whether its chunks' words are known too."""
        if not self._tokenizer.remembers(passage.title, passage.text):
            return False
        return not worded or self._drafts.has_words(self._tokenizer.passage_ids(passage.title, passage.text))


def decode_request(
    plan: PlanResponse,
    sampling: Sampling,
    *,
    mode: AttentionMode = ATTENTION_MODE_BLOCK,
    collection: str = "",
) -> DecodeRequest:
    """What the decoder is asked for a plan; ``collection`` of the passages that were retrieved."""
    blocks = [PromptBlock(token_ids=plan.instruction_token_ids)]
    for planned in plan.passages:
        if planned.in_prompt:
            # Given passages have no document, and so belong to no collection.
            own = collection if planned.document_id else ""
            block = PromptBlock(token_ids=planned.token_ids, document_id=planned.document_id, collection=own)
            forms = [chunk.form for chunk in planned.chunks]
            if CHUNK_FORM_COMPRESSED in forms:
                block.chunk_tokens = plan.chunk_tokens
                block.forms.extend(forms)
            blocks.append(block)
    blocks.extend(plan.turns)
    return DecodeRequest(blocks=blocks, final_token_ids=plan.final_token_ids, attention_mode=mode, sampling=sampling)
