"""Where a plan is made: here, unless it needs the compressor.

A plan that follows from the passages' sizes is tokenising and adding up, 0.2 to 0.4 ms for passages that were seen
before; asking another replica for it takes ten times as long. What takes a policy, the decoder's measurements, or long
tokenising is the compressor's: its replicas can be scaled for it, and this event loop carries every client's stream.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

from blockrag.compressor.compression_request import CompressionRequest, sizes_decide
from blockrag.compressor.plans import Planner
from blockrag.compressor.sentences import read_spans
from blockrag.handles import CompressorClient
from blockrag.recent import Recent
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    CHUNK_FORM_COMPRESSED,
    CHUNK_FORM_DROPPED,
    AttentionMode,
    Passage,
    PromptBlock,
    Sampling,
    TokenSpan,
)
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse
from blockrag.v1.decoder_pb2 import DecodeRequest

MOST_UNKNOWN_CHARS = 8_192
"""Passage text that is tokenised and described here for one plan; takes about 5 ms, three times that where the
vocabulary is not byte-level."""
_KEPT = 32
_FRESH_S = 60.0
_LEAST_EXPECTED = 8
_IN_TIME = 0.97
"""Of the latest; 19 of 20 are promised, and few answers tell a high quantile badly."""
_TOLERATED = 1.1
_ELSEWHERE = ("retrieve", "kv_fetch", "compose", "prefill")
"""Stages that a plan under a latency budget knows or predicts itself."""


class NearPlanner:
    """Plans without the compressor where it can. Not thread-safe: it lives in one event loop."""

    def __init__(self, own: Planner, compressor: CompressorClient) -> None:
        """``own`` plans what sizes decide, and remembers the compressor's results too."""
        self._own = own
        self._compressor = compressor
        self.prepare_question = compressor.prepare_question

    async def plan(self, request: PlanRequest, compression: CompressionRequest | None) -> PlanResponse:
        """Decides what enters the prompt. Raises what either planner raises.

        ``compression``: what the request's message was read as.
        """
        near = sizes_decide(compression, self._own.ability)
        worded = compression is not None and self._own.ability.policies is not None
        if near and self._unknown_chars(request, worded) <= MOST_UNKNOWN_CHARS:
            return await self._own.plan_read(request, compression)
        response = await self._compressor.plan(request)
        for passage, planned in zip(request.passages, response.passages, strict=False):
            self._own.tokenizer.remember(passage.title, passage.text, planned.token_ids)
            if near and worded:
                self._own.drafts.remember(planned)
        return response

    def _unknown_chars(self, request: PlanRequest, worded: bool) -> int:
        return sum(len(passage.text) for passage in request.passages if not self._knows(passage, worded))

    def _knows(self, passage: Passage, worded: bool) -> bool:
        """Whether a passage was tokenised before, and ``worded``: whether its chunks' words are known too."""
        if not self._own.tokenizer.remembers(passage.title, passage.text):
            return False
        return not worded or self._own.drafts.has_words(self._own.tokenizer.passage_ids(passage.title, passage.text))


def decode_request(
    plan: PlanResponse,
    sampling: Sampling,
    *,
    mode: AttentionMode = ATTENTION_MODE_BLOCK,
    collection: str = "",
    best_last: bool = False,
) -> DecodeRequest:
    """What the decoder is asked for a plan; ``collection`` of the passages that were retrieved.

    ``best_last``: passages stand in the prompt in the opposite order of the plan's.
    """
    blocks = [PromptBlock(token_ids=plan.instruction_token_ids)]
    for planned in reversed(plan.passages) if best_last else plan.passages:
        if planned.in_prompt:
            # Given passages have no document, and so belong to no collection.
            own = collection if planned.document_id else ""
            block = PromptBlock(token_ids=planned.token_ids, document_id=planned.document_id, collection=own)
            forms = [chunk.form for chunk in planned.chunks]
            if CHUNK_FORM_COMPRESSED in forms:
                block.chunk_tokens = plan.chunk_tokens
                block.forms.extend(forms)
            elif CHUNK_FORM_DROPPED in forms:
                block.kept.extend(TokenSpan(start=start, end=end) for start, end in read_spans(planned))
            blocks.append(block)
    blocks.extend(plan.turns)
    return DecodeRequest(blocks=blocks, final_token_ids=plan.final_token_ids, attention_mode=mode, sampling=sampling)


class Overhead:
    """The median, over the latest answers, of waiting, the calls between services and planning, without the policy's
    own time.

    A plan for a latency needs it: time that is spent there cannot be spent on slots. Answers whose plans took a call to
    the compressor count where there are any. What is a minute old counts no more: after a busy time everything that
    is asked for would be refused, and so nothing would be measured that says that it is over. Not for several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._by_compressor = Recent(_KEPT, _FRESH_S, clock)
        self._near = Recent(_KEPT, _FRESH_S, clock)
        self._late = Recent(2 * _KEPT, _FRESH_S, clock)
        """How many times what was expected they took."""

    def record(
        self,
        time_to_first_token_ms: float,
        stage_ms: Mapping[str, float],
        policy_ms: float = 0.0,
        *,
        by_compressor: bool = False,
    ) -> None:
        """Count one answer, ``by_compressor``: planned by it; one without a first token says nothing."""
        if time_to_first_token_ms > 0:
            known = policy_ms + sum(stage_ms.get(stage, 0.0) for stage in _ELSEWHERE)
            latest = self._by_compressor if by_compressor else self._near
            latest.record(max(0.0, time_to_first_token_ms - known))

    def record_expected(self, time_to_first_token_ms: float, expected_ms: float) -> None:
        """Count one answer whose plan was made for a time."""
        if time_to_first_token_ms > 0:
            self._late.record(time_to_first_token_ms / expected_ms)

    def margin_ms(self, max_ttft_ms: float) -> float:
        """What a plan for a time leaves free of passages.

        So much that nearly all of the latest such answers would have come a tenth too late at most, but the one that
        came latest; never more than half.
        """
        late = sorted(self._late.values())
        if len(late) < _LEAST_EXPECTED:
            return 0.0
        usual = late[min(math.ceil(_IN_TIME * len(late)), len(late) - 1) - 1]
        return max_ttft_ms * (1 - 1 / min(max(usual / _TOLERATED, 1.0), 2.0))

    @property
    def milliseconds(self) -> float:
        """Typical overhead of an answer that the compressor plans; 0 before the first answer of the last minute."""
        latest = self._by_compressor.values() or self._near.values()
        return statistics.median(latest) if latest else 0.0
