"""How much of a prompt passages may take, and which passages and chunks of them fit: pure functions of sizes.

A compressed chunk takes one slot, an expanded one a slot per token. So a budget of slots leaves, beyond one slot for
every chunk, room to expand some; a policy's logits say which come first, and they do not depend on the budget. Serving,
training, evaluation and benchmarks count with these functions and no others.

Two rules for what does not fit. A *passage* is dropped and smaller ones further down may still enter: the prompt is
used rather than the order kept. *Chunks* are expanded one after another up to the first that does not fit, so that a
larger budget only adds chunks.

Source: REFRAG (arXiv 2509.01092, section 2 and the section on selective compression); budgets of tokens and time are
ours. Imports numpy alone, so that a plan that follows from sizes needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blockrag.errors import InvalidRequestError, PromptTooLongError

BudgetKind = Literal["rate", "max_context_tokens", "max_ttft_ms", "auto"]
"""What a request bounds: tokens per slot, slots, milliseconds until the first token; or what the question needs."""
RELEVANT = 0.7
"""Share of the best passage's relevance from which on another one is read, where the request says "auto". Measured:
docs/experiments.md, "How many passages a question needs"."""
UNSAID = 0.4
"""The same, of what a passage shares with the question that none of those read shares: of a question for two things,
the second. Measured: docs/experiments.md, "Questions that need two passages"."""
_WHOLE = " (by the policy retrieval passages are read whole or not at all)"


def passage_budget(
    max_positions: int, before_tokens: int, final_tokens: int, answer_tokens: int, max_context_tokens: int
) -> int:
    """Tokens left for passages, of ``max_positions`` that prompt and answer may have together.

    ``before_tokens``: of the instruction block, and of the conversation before the question; ``max_context_tokens``:
    the request's own bound, 0: none. Raises ``PromptTooLongError`` when question and answer alone do not fit the model.
    """
    left = max_positions - before_tokens - final_tokens - answer_tokens
    if left < 0:
        raise PromptTooLongError(
            f"question ({final_tokens} tokens), what stands before it ({before_tokens}) and answer ({answer_tokens}) "
            f"do not fit the model's {max_positions} positions: shorten the question or the conversation, or lower "
            "max_tokens"
        )
    return min(left, max_context_tokens) if max_context_tokens else left


@dataclass(frozen=True)
class PassageDecision:
    """What becomes of one passage."""

    in_prompt: bool
    dropped_reason: str = ""


@dataclass(frozen=True)
class Room:
    """What a budget leaves before any chunk is chosen."""

    decisions: list[PassageDecision]
    """Which passages are in the prompt, at least compressed."""
    extra_slots: int
    """Slots beyond one for each chunk of those; at least 0."""
    needed_slots: int
    """The extra slots that expanding every chunk takes."""

    @property
    def kept(self) -> list[int]:
        """Places of the passages that are in the prompt."""
        return [place for place, decision in enumerate(self.decisions) if decision.in_prompt]

    @property
    def choice(self) -> bool:
        """Whether some chunks can be expanded and not all."""
        return 0 < self.extra_slots < self.needed_slots

    @property
    def everything(self) -> bool:
        """Whether every chunk can be expanded."""
        return self.extra_slots >= self.needed_slots


@dataclass(frozen=True)
class FetchCost:
    """What having blocks takes that are at one place."""

    tier: str
    base_ms: float
    token_ms: float


@dataclass(frozen=True)
class PrefillCost:
    """What a prefill takes on the decoder, as it measured lately."""

    base_ms: float
    slot_ms: float
    """For each composed slot."""
    fetches: tuple[FetchCost, ...] = ()
    """Of what is not in the decoder's own memory."""

    def fetch_ms(self, tokens: Mapping[str, int]) -> float:
        """To have blocks, of which so many tokens are at each place; they come at the same time."""
        times = (each.base_ms + each.token_ms * tokens[each.tier] for each in self.fetches if tokens.get(each.tier))
        return max(times, default=0.0)

    def slots(self, milliseconds: float) -> int:
        """Composed slots that can be afforded; at least 0."""
        left = milliseconds - self.base_ms
        if left <= 0:
            return 0
        # A slot that was measured to cost nothing would afford any number: the model's positions bound it.
        return int(min(left / max(self.slot_ms, 1e-9), 2**31))


def chunk_bounds(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Start and end of each chunk of a block of ``tokens``, in order; together they cover it, the last may be shorter.

    Raises ValueError for a block without tokens and for ``chunk_tokens`` below 1.
    """
    _check(tokens, chunk_tokens)
    return [(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def chunk_count(tokens: int, chunk_tokens: int) -> int:
    """Chunks of a block of ``tokens``. Raises ValueError as ``chunk_bounds``."""
    _check(tokens, chunk_tokens)
    return -(-tokens // chunk_tokens)


def chunk_lengths(passage_tokens: Sequence[int], chunk_tokens: int) -> NDArray[np.int64]:
    """Tokens of every chunk of all passages, in order, int64 [chunks]; one less is what expanding it costs."""
    sizes = np.asarray(passage_tokens, dtype=np.int64)
    counts = -(-sizes // chunk_tokens)
    lengths = np.full(counts.sum(), chunk_tokens, dtype=np.int64)
    lengths[np.cumsum(counts) - 1] = sizes - chunk_tokens * (counts - 1)
    return lengths


def composed_slots(
    passage_tokens: Sequence[int], expanded: Sequence[bool] | NDArray[np.bool_], chunk_tokens: int
) -> int:
    """Slots of passages with these chunks [chunks] expanded and the others compressed to one slot each.

    Raises ValueError when ``expanded`` has not one entry per chunk.
    """
    lengths = chunk_lengths(passage_tokens, chunk_tokens)
    if len(expanded) != len(lengths):
        raise ValueError(f"{len(expanded)} decisions for {len(lengths)} chunks")
    return int(np.where(np.asarray(expanded, dtype=np.bool_), lengths, 1).sum())


def expand_what_fits(
    passage_tokens: Sequence[int], budget_tokens: int, *, compressed: bool = False
) -> list[PassageDecision]:
    """Takes passages, best first, while they fit; a passage that does not fit is dropped with the reason.

    ``passage_tokens`` holds the tokens of each candidate's block, or the slots that it takes ``compressed``. A smaller
    passage further down may still fit after a larger one was dropped: the budget is used rather than the order kept.
    """
    decisions = []
    left = budget_tokens
    for tokens in passage_tokens:
        if tokens <= left:
            left -= tokens
            decisions.append(PassageDecision(in_prompt=True))
        else:
            how = " even compressed" if compressed else ""
            reason = f"over the token budget: needs {tokens}{how}, {left} of {budget_tokens} left"
            decisions.append(PassageDecision(in_prompt=False, dropped_reason=reason))
    return decisions


def wanted_tokens(passage_tokens: Sequence[int], kind: BudgetKind, limit: float, budget_tokens: int) -> int:
    """Passage tokens that a budget leaves where nothing is compressed to fewer slots; a time is not known here."""
    wanted = int(limit) if kind == "max_context_tokens" else int(sum(passage_tokens) / limit)
    return min(wanted, budget_tokens)


def whole_passages(
    passage_tokens: Sequence[int], kind: BudgetKind, limit: float, budget_tokens: int
) -> list[PassageDecision]:
    """What becomes small by whole passages: they are taken best first, and the rest left out.

    A rate keeps the best passage in any case.
    """
    wanted = wanted_tokens(passage_tokens, kind, limit, budget_tokens)
    if kind == "rate" and passage_tokens:
        wanted = min(max(wanted, passage_tokens[0]), budget_tokens)
    decisions = expand_what_fits(passage_tokens, wanted)
    return [
        decision if decision.in_prompt else replace(decision, dropped_reason=decision.dropped_reason + _WHOLE)
        for decision in decisions
    ]


def relevant_passages(
    passage_tokens: Sequence[int], relevance: NDArray[np.float64], budget_tokens: int
) -> list[PassageDecision]:
    """Takes what the question seems to need: the first passage, those that are nearly as relevant as any, and those
    that say much of what these do not.

    ``relevance`` [passages, words of the question], at least 0; where it is 0 for all passages it says nothing, and
    none is left out for it. Of what is wanted, what fits is taken, best first.
    """
    totals = relevance.sum(axis=1)
    best = totals.max(initial=0.0)
    least = RELEVANT * best
    taken = totals >= least
    taken[:1] = True
    while best:
        unsaid = np.where(relevance[taken].any(axis=0), 0.0, relevance).sum(axis=1)
        if unsaid.max() < UNSAID * best:
            break
        taken[unsaid.argmax()] = True
    wanted = np.flatnonzero(taken).tolist()
    fits = dict(zip(wanted, expand_what_fits([passage_tokens[place] for place in wanted], budget_tokens), strict=True))
    return [
        fits.get(place)
        or PassageDecision(False, f"shares {value:.2f} with the question; from {least:.2f} on passages are read")
        for place, value in enumerate(totals)
    ]


def room_for(
    passage_tokens: Sequence[int],
    chunk_tokens: int,
    kind: BudgetKind,
    limit: float,
    most_slots: int = 2**62,
    timed_slots: int = 0,
) -> Room:
    """The room that a budget, ``limit`` of ``kind``, leaves for passages of these sizes, best first.

    ``most_slots``: what model and request allow passages to take in any case; ``timed_slots``: what a ``max_ttft_ms``
    affords. Passages that do not fit even compressed are dropped, the worst first; never for a rate, which says how
    small the prompt is to become and not how small it must be: at the highest rate every chunk is compressed, and
    the last ones of passages, being shorter, may keep it from being reached.
    """
    sizes = [chunk_count(tokens, chunk_tokens) for tokens in passage_tokens]
    if kind == "max_context_tokens":
        most_slots = min(most_slots, int(limit))
    elif kind == "max_ttft_ms":
        most_slots = min(most_slots, timed_slots)
    decisions = expand_what_fits(sizes, most_slots, compressed=True)
    kept = [index for index, decision in enumerate(decisions) if decision.in_prompt]
    tokens = sum(passage_tokens[index] for index in kept)
    compressed = sum(sizes[index] for index in kept)
    if kind == "rate":
        most_slots = min(most_slots, int(tokens / limit))
    return Room(decisions, max(0, most_slots - compressed), tokens - compressed)


def expand(logits: NDArray[np.float32], lengths: NDArray[np.int64], extra_slots: int) -> NDArray[np.bool_]:
    """Which chunks to expand, bool [chunks]: as many of the highest logits, one after another, as there is room for.

    ``logits`` [chunks], ``lengths`` [chunks] as ``chunk_lengths`` gives them. No chunk is expanded while one of a
    higher logit is not; among equals the earlier goes first. Raises ValueError for a logit that is NaN.
    """
    if np.isnan(logits).any():
        raise ValueError("a chunk's logit is NaN")
    return expand_in_order(np.argsort(-logits, kind="stable"), lengths, extra_slots)


def expand_in_order(
    order: Sequence[int] | NDArray[np.int64], lengths: NDArray[np.int64], extra_slots: int
) -> NDArray[np.bool_]:
    """The chunks of ``order``, one after another, up to the first that there is no room for; bool [chunks].

    ``order`` holds places of chunks, each once, and not necessarily all: what it leaves out stays compressed. Raises
    ValueError for negative room.
    """
    if extra_slots < 0:
        raise ValueError(f"{extra_slots} slots for expanding chunks: must not be negative")
    places = np.asarray(order, dtype=np.int64)
    needed = np.cumsum(lengths[places] - 1)
    mask = np.zeros(len(lengths), dtype=np.bool_)
    mask[places[: int(np.searchsorted(needed, extra_slots, side="right"))]] = True
    return mask


def expand_at_rate(
    logits: NDArray[np.float32], passage_tokens: Sequence[int], chunk_tokens: int, rate: float
) -> NDArray[np.bool_]:
    """What ``expand`` makes of the room that a rate leaves where nothing else bounds the prompt; bool [chunks]."""
    room = room_for(passage_tokens, chunk_tokens, "rate", rate)
    return expand(logits, chunk_lengths(passage_tokens, chunk_tokens), room.extra_slots)


def retrieval_logits(passage_tokens: Sequence[int], chunk_tokens: int) -> NDArray[np.float32]:
    """Logits of the policy "retrieval": every chunk of a better passage above every one of a worse."""
    counts = [chunk_count(tokens, chunk_tokens) for tokens in passage_tokens]
    return -np.repeat(np.arange(len(counts), dtype=np.float32), counts)


@dataclass(frozen=True)
class InTime:
    """Which passages a time to first token leaves."""

    decisions: list[PassageDecision]
    fetch_ms: float
    """To have the blocks of those that it leaves, and of what stands before them."""


def passages_in_time(
    passage_tokens: Sequence[int],
    least_slots: Sequence[int],
    tiers: Sequence[Sequence[str]],
    cost: PrefillCost,
    left_ms: float,
    most_slots: int,
    before: Mapping[str, int],
) -> InTime:
    """Takes passages, best first, whose blocks will be there in time and leave the time to read them.

    ``least_slots`` that each takes in the prompt, of ``most_slots``; ``tiers`` where its block is, in each form that is
    needed; ``before``: tokens by tier of the blocks that stand before passages. ``left_ms`` for having all blocks and
    reading the passages'. One that is too late, or too large, is dropped, and those further down may still enter.
    """
    decisions, taken, fetched = [], 0, Counter(before)
    for tokens, slots, places in zip(passage_tokens, least_slots, tiers, strict=True):
        further = fetched.copy()
        for tier in places:
            further[tier] += tokens
        whole_ms = cost.fetch_ms(further) + cost.slot_ms * (taken + slots)
        reason = ""
        if slots > most_slots - taken:
            reason = f"over the token budget: needs {slots}, {most_slots - taken} of {most_slots} left"
        elif whole_ms > left_ms:
            what = "it is not encoded yet, and" if "encoded" in places else "with it"
            reason = f"not in time: {what} {whole_ms:.0f} ms would be needed where {max(0.0, left_ms):.0f} are left"
        else:
            taken, fetched = taken + slots, further
        decisions.append(PassageDecision(not reason, reason))
    return InTime(decisions, cost.fetch_ms(fetched))


def affordable_slots(
    cost: PrefillCost, max_ttft_ms: float, spent_ms: float, instruction_slots: int, margin_ms: float = 0.0
) -> int:
    """Slots that passages may take so that the first token comes in time, and ``margin_ms`` sooner.

    ``spent_ms`` of the time is not the decoder's; the instruction block is composed too. Raises
    ``InvalidRequestError`` when the question alone takes longer, whatever the margin.
    """
    least = spent_ms + cost.base_ms + instruction_slots * cost.slot_ms
    if max_ttft_ms < least:
        raise InvalidRequestError(
            "compression.max_ttft_ms",
            f"is {max_ttft_ms:g}; the question without any passage takes about {least:.0f} ms",
        )
    return max(0, cost.slots(max_ttft_ms - margin_ms - spent_ms) - instruction_slots)


def _check(tokens: int, chunk_tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"{tokens} tokens: a block has at least one")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens}: must be at least 1")
