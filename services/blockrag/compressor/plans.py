"""From a plan request to a plan: tokenise, decide, describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blockrag.budget import PromptBudget, composed_slots, expand_what_fits, whole_passages
from blockrag.compressor.compression import CompressionAbility, CompressionRequest, read_compression
from blockrag.compressor.drafts import PassageDrafts
from blockrag.compressor.mixtures import Candidates, Mixture, mix_by_size
from blockrag.compressor.tokenizing import PassageTokenizer
from blockrag.errors import InvalidRequestError
from blockrag.v1 import common_pb2, compressor_pb2

if TYPE_CHECKING:
    from blockrag.compressor.mixing import Mixer


class Planner:
    """Makes plans for one bundle."""

    def __init__(
        self,
        tokenizer: PassageTokenizer,
        max_positions: int,
        ability: CompressionAbility,
        drafts: PassageDrafts,
        mixer: Mixer | None = None,
    ) -> None:
        """``mixer``: None where the bundle cannot compress, or compressed plans are made that ``sizes_decide`` only."""
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._ability = ability
        self._chunk_tokens = ability.chunk_tokens
        self._drafts = drafts
        self._mixer = mixer

    async def plan(self, request: compressor_pb2.PlanRequest) -> compressor_pb2.PlanResponse:
        """The plan of a request whose compression was not read yet; raises what ``plan_read`` raises, and
        ``InvalidRequestError`` for a compression that cannot be.
        """
        return await self.plan_read(
            request, read_compression(request.compression, request.attention_mode, self._ability)
        )

    async def plan_read(
        self, request: compressor_pb2.PlanRequest, compression: CompressionRequest | None
    ) -> compressor_pb2.PlanResponse:
        """The plan of a request; passages keep the request's order. Without compression it is made at once.

        ``compression``: what the request's own message reads as.

        Raises ``InvalidRequestError`` for a passage without text, ``PromptTooLongError`` when the question alone does
        not fit, and what the services raise that compression needs.
        """
        final_ids = self._tokenizer.final_ids(request.question)
        turns = self._turns(request)
        before_tokens = len(self._tokenizer.instruction_ids) + sum(map(len, turns))
        budget = PromptBudget(
            max_positions=self._max_positions,
            instruction_tokens=before_tokens,
            final_tokens=len(final_ids),
            answer_tokens=request.max_tokens,
            max_context_tokens=request.max_context_tokens,
        )
        left = budget.passage_tokens()
        none = request.attention_mode == common_pb2.ATTENTION_MODE_NONE
        passages = [] if none else list(request.passages)
        blocks = [self._block(passage) for passage in passages]
        sizes = [len(ids) for ids in blocks]
        mixture = None
        if compression is None:
            decisions = expand_what_fits(sizes, left)
        elif self._ability.policies is None:
            decisions = whole_passages(sizes, compression.kind, compression.limit, left)
        else:
            mixture = await self._mixture(request, compression, blocks, before_tokens, final_ids, left)
            decisions = mixture.decisions
        response = compressor_pb2.PlanResponse(
            instruction_token_ids=self._tokenizer.instruction_ids,
            final_token_ids=final_ids,
            prompt_tokens=before_tokens + len(final_ids),
            turns=[common_pb2.PromptBlock(token_ids=ids) for ids in turns],
            chunk_tokens=self._chunk_tokens,
            policy_ms=mixture.policy_ms if mixture else 0.0,
        )
        draft = self._drafts.plain if mixture is None else self._drafts.worded
        for place, (passage, ids, decision) in enumerate(zip(passages, blocks, decisions, strict=True)):
            planned = response.passages.add()
            planned.CopyFrom(draft(ids))
            planned.passage_id = passage.passage_id
            planned.document_id = passage.document_id
            planned.in_prompt = decision.in_prompt
            planned.dropped_reason = decision.dropped_reason
            if not decision.in_prompt:
                for chunk in planned.chunks:
                    chunk.form = common_pb2.CHUNK_FORM_DROPPED
            elif mixture is None:
                response.prompt_tokens += len(ids)
            else:
                expanded = mixture.expanded[place]
                for index in np.flatnonzero(expanded).tolist():
                    planned.chunks[index].form = common_pb2.CHUNK_FORM_EXPANDED
                response.prompt_tokens += composed_slots([len(ids)], expanded, self._chunk_tokens)
        return response

    async def prepare(self, question: str) -> None:
        """Embed a question that will be planned for with compression; nothing where the bundle cannot compress."""
        if self._mixer is not None:
            await self._mixer.prepare(self._tokenizer.final_ids(question))

    def tokenize(self, request: compressor_pb2.TokenizePassagesRequest) -> compressor_pb2.TokenizePassagesResponse:
        """The passages' blocks, in the request's order."""
        response = compressor_pb2.TokenizePassagesResponse(
            instruction_token_ids=self._tokenizer.instruction_ids,
        )
        for passage in request.passages:
            response.passages.add(
                passage_id=passage.passage_id, document_id=passage.document_id, token_ids=self._block(passage)
            )
        return response

    async def _mixture(
        self,
        request: compressor_pb2.PlanRequest,
        compression: CompressionRequest,
        blocks: list[tuple[int, ...]],
        before_tokens: int,
        final_ids: tuple[int, ...],
        most_slots: int,
    ) -> Mixture:
        document_ids = [passage.document_id for passage in request.passages]
        candidates = Candidates(blocks, document_ids, before_tokens, final_ids, most_slots)
        if self._mixer is None:
            return mix_by_size(compression, candidates, self._chunk_tokens)
        return await self._mixer.mix(request, compression, candidates)

    def _turns(self, request: compressor_pb2.PlanRequest) -> list[tuple[int, ...]]:
        """Blocks of what the caller asks of every answer, and of the conversation so far."""
        asked = [self._tokenizer.request_ids(request.instructions)] if request.instructions else []
        return asked + [self._tokenizer.turn_ids(turn.question, turn.answer) for turn in request.turns]

    def _block(self, passage: common_pb2.Passage) -> tuple[int, ...]:
        if not passage.text:
            raise InvalidRequestError("passages", f"passage {passage.passage_id!r} has no text")
        return self._tokenizer.passage_ids(passage.title, passage.text)
