"""From a plan request to a plan: tokenise, decide (here what needs no model), describe."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from blockrag.budget import (
    InTime,
    PassageDecision,
    PrefillCost,
    Room,
    affordable_slots,
    chunk_count,
    chunk_lengths,
    composed_slots,
    expand,
    expand_what_fits,
    passage_budget,
    passages_in_time,
    relevant_passages,
    retrieval_logits,
    room_for,
    wanted_tokens,
    whole_passages,
)
from blockrag.compressor.compression_request import RETRIEVAL, CompressionAbility, CompressionRequest, read_compression
from blockrag.compressor.sentences import chosen, order_of, read_spans
from blockrag.compressor.tokenizing import PassageDrafts, PassageTokenizer
from blockrag.errors import InvalidRequestError
from blockrag.v1 import common_pb2, compressor_pb2

if TYPE_CHECKING:
    from blockrag.compressor.mixing import Mixer
    from blockrag.compressor.ttft import TtftEstimator


_AT_HAND = frozenset(("l1", "store"))


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
    places: Sequence[int]
    """Of each among those that were retrieved."""


@dataclass(frozen=True)
class Timed:
    """What a plan for a time knows of its passages."""

    cost: PrefillCost
    places: Sequence[int]
    """Of each among those that were retrieved; the others are late."""


@dataclass(frozen=True)
class Mixture:
    """What becomes of the candidates."""

    decisions: list[PassageDecision]
    expanded: list[NDArray[np.bool_]]
    """Of the chunks of each passage that is in the prompt; no rows for one that is dropped."""
    policy_ms: float = 0.0
    """Time that the policy took; 0: it was not asked."""


def mixture_by_size(room: Room, sizes: Sequence[int], chunk_tokens: int) -> Mixture:
    """Better passages' chunks first, where there is a choice."""
    kept = room.kept
    lengths = chunk_lengths([sizes[place] for place in kept], chunk_tokens)
    if room.choice:
        logits = retrieval_logits([sizes[place] for place in kept], chunk_tokens)
        expanded = expand(logits, lengths, room.extra_slots)
    else:
        expanded = np.full(len(lengths), room.everything)
    return Mixture(room.decisions, by_passage(expanded, sizes, kept, chunk_tokens))


def by_passage(
    expanded: NDArray[np.bool_], sizes: Sequence[int], kept: Sequence[int], chunk_tokens: int
) -> list[NDArray[np.bool_]]:
    """Of each passage, which of its chunks are expanded; none of one that is not ``kept``."""
    parts = [np.zeros(0, dtype=np.bool_)] * len(sizes)
    start = 0
    for place in kept:
        end = start + chunk_count(sizes[place], chunk_tokens)
        parts[place] = expanded[start:end]
        start = end
    return parts


@dataclass
class Planner:
    """Makes plans for one bundle."""

    tokenizer: PassageTokenizer
    max_positions: int
    ability: CompressionAbility
    drafts: PassageDrafts
    mixer: Mixer | None = None
    """None where the bundle cannot compress."""
    estimator: TtftEstimator | None = None
    """This and the mixer are None where plans are made that ``sizes_decide`` only."""

    async def plan(self, request: compressor_pb2.PlanRequest) -> compressor_pb2.PlanResponse:
        """The plan of a request whose compression was not read yet; raises what ``plan_read`` raises, and
        ``InvalidRequestError`` for a compression that cannot be.
        """
        compression = read_compression(request.compression, request.attention_mode, self.ability)
        if compression is not None and compression.kind == "max_ttft_ms" and self.estimator is not None:
            return await self._plan_in_time(request, compression, self.estimator)
        return await self.plan_read(request, compression)

    async def _plan_in_time(
        self, request: compressor_pb2.PlanRequest, compression: CompressionRequest, estimator: TtftEstimator
    ) -> compressor_pb2.PlanResponse:
        """A plan of the passages whose blocks are there in time; others are brought into memory afterwards."""
        final_ids, turns = self.tokenizer.final_ids(request.question), self._turns(request)
        blocks = [self._block(passage) for passage in request.passages]
        sizes = list(map(len, blocks))
        before = [self.tokenizer.instruction_ids, *turns]
        before_tokens = sum(map(len, before))
        estimated = await estimator.estimate(request.context, blocks, before)
        cost = estimated.cost
        chosen = passages_in_time(
            sizes,
            self._least_slots(sizes, compression.policy),
            estimated.passages,
            cost,
            compression.limit - request.margin_ms - request.spent_ms - cost.base_ms - cost.slot_ms * before_tokens,
            self._room(request, before_tokens, len(final_ids)),
            estimated.before,
        )
        response = await self._plan_of(request, compression, blocks, chosen, cost)
        read = [planned.in_prompt for planned in response.passages]
        fetch_ms = estimated.fetch_ms(sizes, read)
        if fetch_ms < chosen.fetch_ms:  # what is not read need not be waited for
            decisions = [PassageDecision(planned.in_prompt, planned.dropped_reason) for planned in response.passages]
            response = await self._plan_of(request, compression, blocks, InTime(decisions, fetch_ms), cost)
        late = [
            place
            for place, planned in enumerate(response.passages)
            if not planned.in_prompt and not _AT_HAND.issuperset(estimated.passages[place])
        ]
        estimator.warm_later(request, blocks, late, compression.limit / 1000)
        return response

    async def _plan_of(
        self,
        request: compressor_pb2.PlanRequest,
        compression: CompressionRequest,
        blocks: Sequence[tuple[int, ...]],
        chosen: InTime,
        cost: PrefillCost,
    ) -> compressor_pb2.PlanResponse:
        """The plan of the passages that are ``chosen``, and why the others are left out."""
        kept = [decision.in_prompt for decision in chosen.decisions]
        shorter = compressor_pb2.PlanRequest()
        shorter.CopyFrom(request)
        shorter.spent_ms += chosen.fetch_ms
        del shorter.passages[:]
        shorter.passages.extend(itertools.compress(request.passages, kept))
        places = tuple(itertools.compress(range(len(kept)), kept))
        response = await self.plan_read(shorter, compression, Timed(cost, places))
        made = iter(list(response.passages))
        del response.passages[:]
        for passage, ids, decision in zip(request.passages, blocks, chosen.decisions, strict=True):
            response.passages.append(next(made) if decision.in_prompt else self._left_out(passage, ids, decision))
        slots = response.prompt_tokens - len(response.final_token_ids)
        response.expected_ms = shorter.spent_ms + response.policy_ms + cost.base_ms + cost.slot_ms * slots
        return response

    def _least_slots(self, sizes: Sequence[int], policy: str) -> list[int]:
        """What passages take at least, where they are read."""
        if self.ability.policies is not None:
            return [chunk_count(tokens, self.ability.chunk_tokens) for tokens in sizes]
        return list(sizes) if policy == RETRIEVAL else [1] * len(sizes)

    def _room(self, request: compressor_pb2.PlanRequest, before_tokens: int, final_tokens: int) -> int:
        return passage_budget(
            self.max_positions, before_tokens, final_tokens, request.max_tokens, request.max_context_tokens
        )

    def _left_out(
        self, passage: common_pb2.Passage, ids: tuple[int, ...], decision: PassageDecision
    ) -> compressor_pb2.PassagePlan:
        draft = self.drafts.plain if self.ability.policies is None else self.drafts.worded
        planned = compressor_pb2.PassagePlan()
        planned.CopyFrom(draft(ids))
        _describe(planned, passage, decision)
        return planned

    async def plan_read(
        self, request: compressor_pb2.PlanRequest, compression: CompressionRequest | None, timed: Timed | None = None
    ) -> compressor_pb2.PlanResponse:
        """The plan of a request; passages keep the request's order. Without compression it is made at once.

        ``compression``: what the request's own message reads as; ``timed``: for a time, what is known already.

        Raises ``InvalidRequestError`` for a passage without text, ``PromptTooLongError`` when the question alone does
        not fit, and what the services raise that compression needs.
        """
        if compression is not None and compression.kind == "max_ttft_ms" and timed is None:
            raise ValueError(f"{compression} is not decided by sizes")
        final_ids = self.tokenizer.final_ids(request.question)
        turns = self._turns(request)
        before_tokens = len(self.tokenizer.instruction_ids) + sum(map(len, turns))
        left = self._room(request, before_tokens, len(final_ids))
        none = request.attention_mode == common_pb2.ATTENTION_MODE_NONE
        passages = [] if none else list(request.passages)
        blocks = [self._block(passage) for passage in passages]
        sizes = [len(ids) for ids in blocks]
        mixture, drafted = None, None
        if compression is None:
            decisions = expand_what_fits(sizes, left)
        elif compression.kind == "auto":
            decisions = relevant_passages(sizes, _relevance(request, passages), left)
        elif self.ability.policies is not None:
            document_ids = [passage.document_id for passage in request.passages]
            places = range(len(blocks)) if timed is None else timed.places
            candidates = Candidates(blocks, document_ids, before_tokens, final_ids, left, places)
            if self.mixer is not None:
                mixture = await self.mixer.mix(request, compression, candidates, None if timed is None else timed.cost)
            else:
                room = room_for(sizes, self.ability.chunk_tokens, compression.kind, compression.limit, left)
                if room.choice and compression.policy != RETRIEVAL:
                    raise ValueError(f"{compression} is not decided by sizes")
                mixture = mixture_by_size(room, sizes, self.ability.chunk_tokens)
            decisions = mixture.decisions
        else:
            if timed is not None:
                slots = affordable_slots(
                    timed.cost, compression.limit, request.spent_ms, before_tokens, request.margin_ms
                )
                compression = replace(compression, kind="max_context_tokens", limit=slots)
            if compression.policy == RETRIEVAL:
                decisions = whole_passages(sizes, compression.kind, compression.limit, left)
            else:
                wanted = wanted_tokens(sizes, compression.kind, compression.limit, left)
                most = left if compression.kind == "rate" else wanted  # a rate says how small, not how small it must be
                drafted = self._by_sentences(request, passages, blocks, wanted, most)
                decisions = [PassageDecision(plan.in_prompt, plan.dropped_reason) for plan in drafted]
        response = compressor_pb2.PlanResponse(
            instruction_token_ids=self.tokenizer.instruction_ids,
            final_token_ids=final_ids,
            prompt_tokens=before_tokens + len(final_ids),
            turns=[common_pb2.PromptBlock(token_ids=ids) for ids in turns],
            chunk_tokens=self.ability.chunk_tokens,
            policy_ms=mixture.policy_ms if mixture else 0.0,
        )
        draft = self.drafts.plain if mixture is None else self.drafts.worded
        for place, (passage, ids, decision) in enumerate(zip(passages, blocks, decisions, strict=True)):
            planned = response.passages.add()
            planned.CopyFrom(draft(ids) if drafted is None else drafted[place])
            _describe(planned, passage, decision)
            if not decision.in_prompt:
                continue
            if mixture is None:
                read = len(ids) if drafted is None else sum(end - start for start, end in read_spans(planned))
                response.prompt_tokens += read
            else:
                expanded = mixture.expanded[place]
                for index in np.flatnonzero(expanded).tolist():
                    planned.chunks[index].form = common_pb2.CHUNK_FORM_EXPANDED
                response.prompt_tokens += composed_slots([len(ids)], expanded, self.ability.chunk_tokens)
        return response

    def _by_sentences(
        self,
        request: compressor_pb2.PlanRequest,
        passages: Sequence[common_pb2.Passage],
        blocks: Sequence[tuple[int, ...]],
        slots: int,
        most: int,
    ) -> list[compressor_pb2.PassagePlan]:
        """What is read of each passage in so many slots, sentence by sentence; a single one may take ``most``."""
        found = [self.drafts.sentences(ids, passage.text) for passage, ids in zip(passages, blocks, strict=True)]
        order = order_of(request.question, found, [passage.title for passage in passages], request.language)
        taken = chosen(order, found, slots, most)
        plans = []
        for ids, sentences, kept in zip(blocks, found, taken, strict=True):
            plan = compressor_pb2.PassagePlan(token_ids=ids, in_prompt=bool(kept))
            plan.dropped_reason = "" if kept else f"over the token budget: others' sentences take the {slots} slots"
            for number, sentence in enumerate(sentences):
                form = common_pb2.CHUNK_FORM_EXPANDED if number in kept else common_pb2.CHUNK_FORM_DROPPED
                if sentence.slots:
                    plan.chunks.add(start_token=sentence.start, end_token=sentence.end, form=form, text=sentence.text)
            plans.append(plan)
        return plans

    async def prepare(self, question: str) -> None:
        """Embed a question that will be planned for with compression; nothing where the bundle cannot compress."""
        if self.mixer is not None:
            await self.mixer.prepare(self.tokenizer.final_ids(question))

    def tokenize(self, request: compressor_pb2.TokenizePassagesRequest) -> compressor_pb2.TokenizePassagesResponse:
        """The passages' blocks, in the request's order."""
        response = compressor_pb2.TokenizePassagesResponse(
            instruction_token_ids=self.tokenizer.instruction_ids,
        )
        for passage in request.passages:
            response.passages.add(
                passage_id=passage.passage_id, document_id=passage.document_id, token_ids=self._block(passage)
            )
        return response

    def _turns(self, request: compressor_pb2.PlanRequest) -> list[tuple[int, ...]]:
        """Blocks of what the caller asks of every answer, and of the conversation so far."""
        asked = [self.tokenizer.request_ids(request.instructions)] if request.instructions else []
        return asked + [self.tokenizer.turn_ids(turn.question, turn.answer) for turn in request.turns]

    def _block(self, passage: common_pb2.Passage) -> tuple[int, ...]:
        if not passage.text:
            raise InvalidRequestError("passages", f"passage {passage.passage_id!r} has no text")
        return self.tokenizer.passage_ids(passage.title, passage.text)


def _describe(planned: compressor_pb2.PassagePlan, passage: common_pb2.Passage, decision: PassageDecision) -> None:
    """Whose plan it is, and what was decided; of one that is left out no chunk is read."""
    planned.passage_id = passage.passage_id
    planned.document_id = passage.document_id
    planned.in_prompt = decision.in_prompt
    planned.dropped_reason = decision.dropped_reason
    if not decision.in_prompt:
        for chunk in planned.chunks:
            chunk.form = common_pb2.CHUNK_FORM_DROPPED


def _relevance(request: compressor_pb2.PlanRequest, passages: Sequence[common_pb2.Passage]) -> NDArray[np.float64]:
    """What each passage shares of the question's words, [passages, words], by BM25 with the passages' own IDF."""
    from blockrag.bm25 import Bm25Scorer  # the gateway imports this module too, and ranks nothing

    texts = [(passage.title, passage.text) for passage in passages]
    return Bm25Scorer(texts, request.language).by_word(request.question)
