"""The way of one question: retrieve, plan, decode, and the events that its client sees.

Pure: the services it calls are given, so the whole flow runs in a test without a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from blockrag.aio import failed
from blockrag.alike import alike
from blockrag.compressor.compression_request import RETRIEVAL, SENTENCES
from blockrag.errors import DeadlineError, UnavailableError
from blockrag.gateway.planning import NearPlanner, Overhead, decode_request
from blockrag.gateway.validation import Question
from blockrag.grpc_status import as_known_error
from blockrag.handles import DecoderClient, RetrieverClient
from blockrag.telemetry import Span, request_fields, span, trace_id_of
from blockrag.v1.common_pb2 import ATTENTION_MODE_NONE, BlockSlots, FinishReason, Passage, RequestContext, StageTime
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse, PrepareQuestionRequest
from blockrag.v1.decoder_pb2 import DecodeFinish, DecodeRequest, DecodeResponse
from blockrag.v1.rag_pb2 import Citation, Completion, GenerateResponse, Retrieved, RetrieveResponse, TextChunk
from blockrag.v1.retriever_pb2 import SearchRequest, SearchResponse

STAGES = ("retrieve", "plan", "queue", "kv_fetch", "compose", "prefill", "decode", "total")
"""Every answer reports all of them, in this order; one that did not happen took 0 ms."""

_REASON = "FINISH_REASON_"
_DECODE_ATTEMPTS = 2
_PREPARING_GRACE_S = 1.0
"""What the embedding of a question may take beyond its answer: cancelled, it would be a failed span in the trace of an
answer that did not fail."""

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass
class Timings:
    """What one answer took so far; clock readings are ``time.perf_counter`` seconds."""

    received: float
    first_text: float = 0.0
    stage_ms: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    """Of the plan; 0 until it is made."""

    @property
    def time_to_first_token_ms(self) -> float:
        """From receiving the request to its first text; 0 when there was none."""
        return (self.first_text - self.received) * 1000 if self.first_text else 0.0

    def stages(self) -> list[StageTime]:
        """All stages, the total up to now."""
        self.stage_ms["total"] = (time.perf_counter() - self.received) * 1000
        return [StageTime(stage=name, milliseconds=self.stage_ms.get(name, 0.0)) for name in STAGES]


class Deadline:
    """The moment at which a request's client stops waiting, on the event loop's clock."""

    def __init__(self, timeout_ms: int) -> None:
        self._timeout_ms = timeout_ms
        self._when = asyncio.get_running_loop().time() + timeout_ms / 1000

    @property
    def left_ms(self) -> int:
        """Until then; at least 1."""
        return max(1, int((self._when - asyncio.get_running_loop().time()) * 1000))

    async def wait(self, work: Awaitable[Result]) -> Result:
        """The result of ``work``, which is cancelled with a ``DeadlineError`` when the time is up."""
        limit = asyncio.timeout_at(self._when)
        try:
            async with limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineError(f"the request took longer than its {self._timeout_ms} ms") from error


@dataclass
class _Way:
    """One question on its way."""

    question: Question
    context: RequestContext
    timings: Timings
    deadline: Deadline
    language: str = ""
    """Of the passages that were retrieved; empty until they are."""
    plan: PlanResponse = field(default_factory=PlanResponse)
    """Empty until it is made."""


@dataclass(frozen=True)
class Answering:
    """Answers questions with the services it is given."""

    searcher: RetrieverClient
    planner: NearPlanner
    decoder: DecoderClient
    bundle_fingerprint: str
    model: str
    """The bundle's name, as traces tell it."""
    record_text: bool = False
    """Write questions into spans."""
    overhead: Overhead = field(default_factory=Overhead)
    """What answers take beside retrieval and the decoder."""
    best_last: bool = True
    """The best of the retrieved passages stands next to the question; those that a request gives stay in its order."""

    async def retrieve(self, search: SearchRequest, current: Span, deadline: Deadline) -> RetrieveResponse:
        """Searches without answering; ``current`` is the request's span."""
        context = current.child_context()
        timings = Timings(received=time.perf_counter())
        found = await self._search(search, context, timings, deadline)
        stages = [stage for stage in timings.stages() if stage.stage in ("retrieve", "total")]
        return RetrieveResponse(request_id=context.request_id, passages=found.passages, stages=stages)

    async def answer(
        self, question: Question, current: Span, timings: Timings, deadline: Deadline
    ) -> AsyncGenerator[GenerateResponse, None]:
        """Streams Retrieved, TextChunk…, Completion; ``current`` is the request's span.

        Raises what the services raise; ``DeadlineError`` at the deadline; ``UnavailableError`` when the decoder went
        away after its first text (before it, the same plan is sent to another decoder once).
        """
        if self.record_text:
            current.set(question=question.text)
        way = _Way(question, current.child_context(), timings, deadline)
        request_id = way.context.request_id
        async with self._preparing(way):
            passages = await self._passages(way)
            pieces: list[str] = []
            finish: DecodeFinish | None = None
            async with aclosing(self._generate(way, passages)) as events:
                # The plan and the decoder's first token are under way while the passages are sent.
                coming = asyncio.ensure_future(anext(events, None))
                try:
                    yield GenerateResponse(request_id=request_id, retrieved=Retrieved(passages=passages))
                    event = await coming
                finally:
                    await _ended(coming)
                while event is not None:
                    if event.text:
                        if not pieces:
                            timings.first_text = time.perf_counter()
                        pieces.append(event.text)
                        yield GenerateResponse(
                            request_id=request_id, text=TextChunk(text=event.text, tokens=event.tokens)
                        )
                    if event.HasField("finish"):
                        finish = event.finish
                        break
                    event = await anext(events, None)
            plan = way.plan
            if finish is None:
                raise UnavailableError("the decoder ended its answer without saying why; ask again")
            timings.stage_ms.update((stage.stage, stage.milliseconds) for stage in finish.stages)
            self.overhead.record(
                timings.time_to_first_token_ms,
                timings.stage_ms,
                plan.policy_ms,
                by_compressor=question.needs_compressor,
            )
            if plan.expected_ms:
                self.overhead.record_expected(timings.time_to_first_token_ms, plan.expected_ms)
            finish.usage.context_tokens = sum(len(planned.token_ids) for planned in plan.passages if planned.in_prompt)
            self._describe(current, finish, timings)
            completion = Completion(
                answer="".join(pieces),
                citations=_citations(passages, plan),
                usage=finish.usage,
                stages=timings.stages(),
                finish_reason=finish.reason,
                time_to_first_token_ms=timings.time_to_first_token_ms,
                seed=question.sampling.seed,
                bundle_fingerprint=self.bundle_fingerprint,
                attention_mode=question.attention_mode,
                trace_id=trace_id_of(current.traceparent),
            )
            _tell_places(completion, finish.blocks, self._best_last(question))
            yield GenerateResponse(request_id=request_id, completion=completion)

    def _describe(self, current: Span, finish: DecodeFinish, timings: Timings) -> None:
        """OpenTelemetry's names for what an answer was."""
        usage = finish.usage
        current.set(
            **{
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "blockrag",
                "gen_ai.request.model": self.model,
                "gen_ai.response.finish_reasons": [FinishReason.Name(finish.reason).removeprefix(_REASON).lower()],
                "gen_ai.response.time_to_first_chunk": timings.time_to_first_token_ms / 1000,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            }
        )

    @asynccontextmanager
    async def _preparing(self, way: _Way) -> AsyncGenerator[None, None]:
        """Has the compressor embed the question while its passages are searched, where the plan may look at it.

        Nobody waits for it before everything was sent; what goes wrong there, the plan tells. An answer that fails, or
        that its client leaves, cancels it.
        """
        question, compression = way.question, way.question.compression
        sees_question = (
            compression is not None and question.needs_compressor and compression.policy not in (RETRIEVAL, SENTENCES)
        )
        if not sees_question or question.given:
            yield
            return
        request = PrepareQuestionRequest(context=way.context, question=question.text)
        preparing = asyncio.ensure_future(self.planner.prepare_question(request))
        try:
            yield
            await asyncio.wait([preparing], timeout=_PREPARING_GRACE_S)
        finally:
            await _ended(preparing)

    async def _generate(self, way: _Way, passages: Sequence[Passage]) -> AsyncGenerator[DecodeResponse, None]:
        """Plans and decodes."""
        question = way.question
        way.plan = await self._plan(way, passages)
        way.timings.prompt_tokens = way.plan.prompt_tokens
        request = decode_request(
            way.plan,
            question.sampling,
            mode=question.attention_mode,
            collection=question.collection,
            best_last=self._best_last(question),
        )
        async with aclosing(self._decode(request, way)) as events:
            async for event in events:
                yield event

    def _best_last(self, question: Question) -> bool:
        return self.best_last and not question.given

    async def _passages(self, way: _Way) -> Sequence[Passage]:
        question = way.question
        if question.attention_mode == ATTENTION_MODE_NONE:
            return []
        if question.given:
            return [
                Passage(passage_id=f"given-{index}", ordinal=index, title=given.title, text=given.text)
                for index, given in enumerate(question.given)
            ]
        search = alike(SearchRequest, question, query=question.text)
        found = await self._search(search, way.context, way.timings, way.deadline)
        way.language = found.language
        return found.passages

    async def _search(
        self, search: SearchRequest, context: RequestContext, timings: Timings, deadline: Deadline
    ) -> SearchResponse:
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "retrieval",
            "gen_ai.data_source.id": search.collection,
            "gen_ai.retrieval.top_k": search.top_k,
        }
        started = time.perf_counter()
        with span("gateway.retrieve", context, **attributes) as current:
            search.context.CopyFrom(current.child_context())
            found = await deadline.wait(self.searcher.search(search))
        timings.stage_ms["retrieve"] = (time.perf_counter() - started) * 1000
        return found

    async def _plan(self, way: _Way, passages: Sequence[Passage]) -> PlanResponse:
        started, question = time.perf_counter(), way.question
        with span("gateway.plan", way.context) as current:
            request = PlanRequest(
                context=current.child_context(),
                question=question.text,
                passages=passages,
                attention_mode=question.attention_mode,
                max_context_tokens=question.max_context_tokens,
                max_tokens=question.sampling.max_tokens,
                turns=question.turns,
                instructions=question.instructions,
                language=way.language,
            )
            if question.compression is not None:
                request.compression.CopyFrom(question.compression.to_message())
                request.collection = question.collection
                request.spent_ms = (started - way.timings.received) * 1000 + self.overhead.milliseconds
                if question.compression.kind == "max_ttft_ms":
                    request.margin_ms = self.overhead.margin_ms(question.compression.limit)
            plan = await way.deadline.wait(self.planner.plan(request, question.compression))
        way.timings.stage_ms["plan"] = (time.perf_counter() - started) * 1000
        return plan

    async def _decode(self, request: DecodeRequest, way: _Way) -> AsyncGenerator[DecodeResponse, None]:
        tokens = 0
        for attempt in range(1, _DECODE_ATTEMPTS + 1):
            with span("gateway.decode", way.context, attempt=attempt) as current:
                request.context.CopyFrom(current.child_context())
                request.time_left_ms = way.deadline.left_ms
                try:
                    async with aclosing(self.decoder.decode(request)) as events:
                        while (event := await way.deadline.wait(anext(events, None))) is not None:
                            tokens += event.tokens
                            if event.HasField("finish"):
                                break
                            yield event
                except Exception as error:
                    known = as_known_error(error)
                    if not isinstance(known, UnavailableError):
                        raise
                    if tokens:
                        raise UnavailableError(
                            f"the decoder went away after {tokens} tokens of the answer; ask again with "
                            f"seed={request.sampling.seed} for the same choices"
                        ) from error
                    if attempt == _DECODE_ATTEMPTS:
                        raise known from error
                    current.fail(str(known))
                    fields = request_fields(way.context)
                    _logger.warning("decoder lost before the first token, retrying: %s", known, extra=fields)
                    continue
            # Outside its span: whoever takes the last event leaves, and the span would say that it was cancelled.
            if event is not None:
                yield event
            return


async def _ended(task: asyncio.Task[Any]) -> None:
    """Stops a task that nobody waits for any more; what went wrong in it was told already, or is nobody's concern."""
    task.add_done_callback(failed)
    if not task.done():
        task.cancel()
        await asyncio.wait([task])


def _citations(passages: Sequence[Passage], plan: PlanResponse) -> list[Citation]:
    return [
        alike(
            Citation,
            passage,
            index=index,
            chunks=planned.chunks,
            tokens=len(planned.token_ids),
            in_prompt=planned.in_prompt,
            dropped_reason=planned.dropped_reason,
        )
        for index, (passage, planned) in enumerate(zip(passages, plan.passages, strict=True))
    ]


def _tell_places(completion: Completion, blocks: Sequence[BlockSlots], best_last: bool) -> None:
    """Says of each passage where it stands, and of each block where it was found.

    ``blocks`` in the order of ``decode_request``, or none; the last ones are turns.
    """
    cited = [citation for citation in completion.citations if citation.in_prompt]
    for place, citation in enumerate(reversed(cited) if best_last else cited, 1):
        citation.place = place
        if blocks:
            citation.slots.CopyFrom(blocks[place])
    if blocks:
        completion.instruction_slots.CopyFrom(blocks[0])
        completion.turn_slots.extend(blocks[1 + len(cited) :])
