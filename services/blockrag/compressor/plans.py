"""From a plan request to a plan: tokenise, decide, describe."""

from __future__ import annotations

from blockrag.compressor.planning import PromptBudget, expand_what_fits
from blockrag.compressor.tokenizing import PassageTokenizer
from blockrag.errors import InvalidRequestError
from blockrag.modeling.refrag.chunks import chunk_bounds
from blockrag.v1 import common_pb2, compressor_pb2


class Planner:
    """Makes plans for one bundle."""

    def __init__(self, tokenizer: PassageTokenizer, max_positions: int, chunk_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._chunk_tokens = chunk_tokens

    def plan(self, request: compressor_pb2.PlanRequest) -> compressor_pb2.PlanResponse:
        """The plan of a request; passages keep the request's order.

        Raises ``InvalidRequestError`` for a passage without text and ``PromptTooLongError`` when the question alone
        does not fit.
        """
        final_ids = self._tokenizer.final_ids(request.question)
        budget = PromptBudget(
            max_positions=self._max_positions,
            instruction_tokens=len(self._tokenizer.instruction_ids),
            final_tokens=len(final_ids),
            answer_tokens=request.max_tokens,
            max_context_tokens=request.max_context_tokens,
        )
        left = budget.passage_tokens()
        none = request.attention_mode == common_pb2.ATTENTION_MODE_NONE
        passages = [] if none else list(request.passages)
        blocks = [self._block(passage) for passage in passages]
        decisions = expand_what_fits([len(ids) for ids in blocks], left)
        response = compressor_pb2.PlanResponse(
            instruction_token_ids=self._tokenizer.instruction_ids,
            final_token_ids=final_ids,
            prompt_tokens=len(self._tokenizer.instruction_ids) + len(final_ids),
        )
        for passage, ids, decision in zip(passages, blocks, decisions, strict=True):
            form = common_pb2.CHUNK_FORM_EXPANDED if decision.in_prompt else common_pb2.CHUNK_FORM_DROPPED
            response.passages.add(
                passage_id=passage.passage_id,
                document_id=passage.document_id,
                token_ids=ids,
                chunks=[
                    common_pb2.ChunkDecision(start_token=start, end_token=end, form=form)
                    for start, end in chunk_bounds(len(ids), self._chunk_tokens)
                ],
                in_prompt=decision.in_prompt,
                dropped_reason=decision.dropped_reason,
            )
            if decision.in_prompt:
                response.prompt_tokens += len(ids)
        return response

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

    def _block(self, passage: common_pb2.Passage) -> tuple[int, ...]:
        if not passage.text:
            raise InvalidRequestError("passages", f"passage {passage.passage_id!r} has no text")
        return self._tokenizer.passage_ids(passage.title, passage.text)
