import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.budget import (
    RELEVANT,
    UNSAID,
    BudgetKind,
    FetchCost,
    PrefillCost,
    Room,
    affordable_slots,
    chunk_bounds,
    chunk_count,
    chunk_lengths,
    composed_slots,
    expand,
    expand_in_order,
    expand_what_fits,
    passage_budget,
    passages_in_time,
    relevant_passages,
    retrieval_logits,
    room_for,
)
from blockrag.errors import InvalidRequestError, PromptTooLongError

PASSAGES = st.lists(st.integers(min_value=1, max_value=200), min_size=1, max_size=20)
CHUNK = st.integers(min_value=1, max_value=16)
PLENTY = 10**6


def planned(
    passages: list[int], chunk: int, request: tuple[BudgetKind, float], most: int, timed: int, seed: int
) -> tuple[Room, np.ndarray, np.ndarray, np.ndarray]:
    """The room, and of the chunks of passages that are in: logits, lengths, which are expanded."""
    room = room_for(passages, chunk, *request, most, timed)
    kept = [tokens for tokens, decision in zip(passages, room.decisions, strict=True) if decision.in_prompt]
    lengths = chunk_lengths(kept, chunk)
    logits = np.random.default_rng(seed).normal(size=len(lengths)).astype(np.float32)
    return room, logits, lengths, expand(logits, lengths, room.extra_slots)


def slots_of(lengths: np.ndarray, expanded: np.ndarray) -> int:
    return int(np.where(expanded, lengths, 1).sum())


class TestExpand:
    @given(st.lists(st.tuples(st.integers(1, 16), st.floats(-5, 5, width=32)), max_size=60), st.integers(0, 400))
    def test_never_beyond_the_room_and_highest_logits_first(self, chunks: list[tuple[int, float]], extra: int) -> None:
        lengths = np.array([length for length, _ in chunks], dtype=np.int64)
        logits = np.array([logit for _, logit in chunks], dtype=np.float32)
        expanded = expand(logits, lengths, extra)
        assert (lengths[expanded] - 1).sum() <= extra
        if expanded.any() and not expanded.all():
            assert logits[expanded].min() >= logits[~expanded].max()
            # The next in line did not fit.
            after = [place for place in np.argsort(-logits, kind="stable") if not expanded[place]]
            assert (lengths[expanded] - 1).sum() + lengths[after[0]] - 1 > extra

    @given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(0, 200), st.integers(0, 200))
    def test_more_room_only_adds_chunks(self, lengths: list[int], extra: int, more: int) -> None:
        logits = np.random.default_rng(len(lengths)).normal(size=len(lengths)).astype(np.float32)
        few = expand(logits, np.array(lengths), extra)
        many = expand(logits, np.array(lengths), extra + more)
        assert (many | ~few).all()


class TestRate:
    @given(PASSAGES, CHUNK, st.floats(1, 16), st.integers(0, 2**32 - 1))
    def test_it_is_reached_unless_everything_is_compressed_already(
        self, passages: list[int], chunk: int, rate: float, seed: int
    ) -> None:
        request = ("rate", min(rate, chunk))
        room, _, lengths, expanded = planned(passages, chunk, request, PLENTY, 0, seed)
        assert all(decision.in_prompt for decision in room.decisions)
        slots = slots_of(lengths, expanded)
        assert not expanded[lengths > 1].any() or sum(passages) / slots >= request[1] - 1e-9

    @given(PASSAGES, CHUNK)
    def test_one_expands_everything(self, passages: list[int], chunk: int) -> None:
        room, _, lengths, expanded = planned(passages, chunk, ("rate", 1.0), PLENTY, 0, 0)
        assert room.everything
        assert expanded.all()
        assert slots_of(lengths, expanded) == sum(passages)

    def test_the_highest_drops_nothing(self) -> None:
        room = room_for([9, 1, 17], 8, "rate", 8.0, PLENTY, 0)
        assert [decision.in_prompt for decision in room.decisions] == [True] * 3
        assert room.extra_slots == 0

    def test_the_models_positions_hold_in_any_case(self) -> None:
        room = room_for([80, 80, 80], 8, "rate", 2.0, 25, 0)
        assert [decision.in_prompt for decision in room.decisions] == [True, True, False]
        assert room.extra_slots == 5


class TestTokenBudget:
    @given(PASSAGES, CHUNK, st.integers(1, 1500), st.integers(0, 2000), st.integers(0, 2**32 - 1))
    def test_never_over_budget(self, passages: list[int], chunk: int, budget: int, most: int, seed: int) -> None:
        request = ("max_context_tokens", budget)
        room, _, lengths, expanded = planned(passages, chunk, request, most, 0, seed)
        assert slots_of(lengths, expanded) <= min(budget, most)
        if room.everything:
            assert expanded.all()

    def test_what_does_not_fit_even_compressed_is_dropped_with_the_reason(self) -> None:
        room = room_for([64, 64, 8], 8, "max_context_tokens", 9, PLENTY, 0)
        assert [decision.in_prompt for decision in room.decisions] == [True, False, True]
        assert room.decisions[1].dropped_reason == "over the token budget: needs 8 even compressed, 1 of 9 left"


class TestTimeBudget:
    @given(st.floats(0.1, 500), st.floats(0, 50), st.floats(0, 1), st.floats(0, 100), st.integers(0, 40))
    def test_what_is_afforded_comes_in_time(
        self, limit: float, base: float, slot: float, spent: float, instruction: int
    ) -> None:
        cost = PrefillCost(base, slot)
        try:
            slots = affordable_slots(cost, limit, spent, instruction)
        except InvalidRequestError as error:
            assert error.field == "compression.max_ttft_ms"
            assert limit < spent + base + instruction * slot
        else:
            assert spent + base + (slots + instruction) * slot <= limit + 1e-6 * (1 + limit)

    def test_the_slots_bound_the_passages(self) -> None:
        room = room_for([64, 64], 8, "max_ttft_ms", 50.0, PLENTY, 30)
        assert room.extra_slots == 14
        assert room_for([64, 64], 8, "max_ttft_ms", 50.0, 20, 30).extra_slots == 4

    def test_a_time_that_the_question_alone_takes_is_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="the question without any passage takes about 13 ms"):
            affordable_slots(PrefillCost(8.0, 0.1), 12.0, 5.0, 1)


@given(PASSAGES, CHUNK)
def test_chunk_lengths_are_those_of_the_chunks(passages: list[int], chunk: int) -> None:
    bounds = itertools.chain.from_iterable(chunk_bounds(tokens, chunk) for tokens in passages)
    assert chunk_lengths(passages, chunk).tolist() == [end - start for start, end in bounds]


@given(PASSAGES, CHUNK, st.integers(0, 500))
def test_retrieval_expands_the_best_passages_first(passages: list[int], chunk: int, extra: int) -> None:
    logits = retrieval_logits(passages, chunk)
    expanded = expand(logits, chunk_lengths(passages, chunk), extra)
    assert expanded.tolist() == sorted(expanded.tolist(), reverse=True)
    assert len(expanded) == sum(chunk_count(tokens, chunk) for tokens in passages)


def test_no_passages() -> None:
    room = room_for([], 8, "rate", 4.0, PLENTY, 0)
    assert room.everything
    assert expand(np.zeros(0, dtype=np.float32), chunk_lengths([], 8), 5).tolist() == []


@given(st.integers(1, 500), st.integers(1, 64))
def test_chunks_cover_the_block_in_order(tokens: int, chunk: int) -> None:
    bounds = chunk_bounds(tokens, chunk)
    assert [position for start, end in bounds for position in range(start, end)] == list(range(tokens))
    assert all(end - start == chunk for start, end in bounds[:-1])
    assert chunk_count(tokens, chunk) == len(bounds)


@pytest.mark.parametrize(("tokens", "chunk"), [(0, 4), (-1, 4), (4, 0)])
def test_refuses_empty_blocks_and_chunks(tokens: int, chunk: int) -> None:
    for function in (chunk_bounds, chunk_count):
        with pytest.raises(ValueError, match="at least"):
            function(tokens, chunk)


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="2 decisions for 3 chunks"):
        composed_slots([4, 5], [True, False], 4)
    with pytest.raises(ValueError, match="NaN"):
        expand(np.array([np.nan], dtype=np.float32), np.array([4]), 9)
    with pytest.raises(ValueError, match="must not be negative"):
        expand_in_order([0], np.array([4]), -1)


def test_an_order_need_not_name_every_chunk_and_ends_at_the_first_that_does_not_fit() -> None:
    lengths = np.array([4, 4, 2, 4])
    assert expand_in_order([3, 0], lengths, 99).tolist() == [True, False, False, True]
    assert expand_in_order([3, 0, 2], lengths, 4).tolist() == [False, False, False, True]


@given(st.lists(st.integers(min_value=1, max_value=300), max_size=30), st.integers(min_value=0, max_value=2000))
def test_what_is_expanded_fits_and_what_is_dropped_did_not(tokens: list[int], budget: int) -> None:
    decisions = expand_what_fits(tokens, budget)
    used = 0
    for needed, decision in zip(tokens, decisions, strict=True):
        assert decision.in_prompt == (needed <= budget - used)
        assert decision.in_prompt == (decision.dropped_reason == "")
        used += needed if decision.in_prompt else 0
    assert used <= budget


def test_a_dropped_passage_says_what_it_needed() -> None:
    assert expand_what_fits([100, 60, 20], 125)[1].dropped_reason == "over the token budget: needs 60, 25 of 125 left"


def test_the_request_may_lower_the_budget_but_not_raise_it() -> None:
    def budget(max_context_tokens: int) -> int:
        return passage_budget(1000, 1, 50, 49, max_context_tokens)

    assert budget(0) == 900
    assert budget(300) == 300
    assert budget(5000) == 900


def test_a_question_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PromptTooLongError, match="shorten the question or the conversation, or lower max_tokens"):
        passage_budget(100, 1, 80, 20, 0)


@given(
    st.lists(st.tuples(st.integers(1, 200), *[st.sampled_from([0.0, 0.0, 0.1, 1.0, 2.5, 9.0])] * 4), max_size=12),
    st.integers(0, 1000),
)
def test_passages_that_a_question_needs(passages: list[tuple[int, float, float, float, float]], budget: int) -> None:
    sizes, relevance = [size for size, *_ in passages], np.array([words for _, *words in passages]).reshape(-1, 4)
    decisions = relevant_passages(sizes, relevance, budget)
    assert len(decisions) == len(passages)
    taken = [place for place, decision in enumerate(decisions) if decision.in_prompt]
    assert sum(sizes[place] for place in taken) <= budget
    assert all(decision.dropped_reason for decision in decisions if not decision.in_prompt)
    wanted = [place for place, decision in enumerate(relevant_passages(sizes, relevance, PLENTY)) if decision.in_prompt]
    assert set(taken) <= set(wanted)
    totals = relevance.sum(axis=1)
    best = totals.max(initial=0.0)
    near = [place for place, value in enumerate(totals) if place == 0 or value >= RELEVANT * best]
    assert set(near) <= set(wanted)
    for place in set(wanted) - set(near):
        assert relevance[place, ~relevance[near].any(axis=0)].any(), "it says what they do not"
    left_out = [place for place in range(len(passages)) if place not in wanted]
    unsaid = relevance[left_out][:, ~relevance[wanted].any(axis=0)].sum(axis=1)
    assert (unsaid < UNSAID * best).all()


def test_a_question_for_two_things_takes_a_passage_for_each() -> None:
    #       Port Orchard Puyallup people
    words = np.array([[3.0, 3.0, 0.0, 0.1], [3.0, 0.0, 0.0, 0.1], [0.0, 0.0, 3.0, 0.1], [0.0, 0.0, 0.0, 0.1]])
    decisions = relevant_passages([80] * 4, words, PLENTY)
    assert [decision.in_prompt for decision in decisions] == [True, False, True, False]
    assert decisions[1].dropped_reason == "shares 3.10 with the question; from 4.27 on passages are read"
    # as much of it as the first passage has too says nothing new
    assert [one.in_prompt for one in relevant_passages([80] * 2, words[:2], PLENTY)] == [True, False]


COST = PrefillCost(
    10.0, 0.5, (FetchCost("store", 2.0, 0.01), FetchCost("disk", 5.0, 0.1), FetchCost("encoded", 50.0, 1.0))
)


_PLACES = ("l1", "store", "disk", "encoded")


@given(
    st.lists(st.tuples(st.integers(1, 200), st.lists(st.sampled_from(_PLACES), min_size=1, max_size=2)), max_size=20),
    st.floats(-100, 2000),
    st.integers(0, 3000),
    st.dictionaries(st.sampled_from(_PLACES), st.integers(1, 50)),
)
def test_what_is_read_in_time_is_there_and_read_in_time(
    passages: list[tuple[int, list[str]]], left_ms: float, most: int, before: dict[str, int]
) -> None:
    sizes, tiers = [tokens for tokens, _ in passages], [places for _, places in passages]
    found = passages_in_time(sizes, sizes, tiers, COST, left_ms, most, before)
    fetched, taken = Counter(before), 0
    for (tokens, places), decision in zip(passages, found.decisions, strict=True):
        assert decision.in_prompt == (not decision.dropped_reason)
        further = fetched + Counter({place: tokens * places.count(place) for place in places})
        needed_ms = COST.fetch_ms(further) + COST.slot_ms * (taken + tokens)
        assert decision.in_prompt == (needed_ms <= left_ms and taken + tokens <= most)
        if decision.in_prompt:
            fetched, taken = further, taken + tokens
    assert found.fetch_ms == pytest.approx(COST.fetch_ms(fetched))


def test_blocks_of_several_places_come_at_the_same_time() -> None:
    assert COST.fetch_ms({}) == COST.fetch_ms({"l1": 500}) == COST.fetch_ms({"store": 0}) == 0.0
    assert COST.fetch_ms({"store": 100, "disk": 100, "l1": 7}) == 15.0
    assert COST.fetch_ms({"store": 100, "encoded": 100}) == 150.0


def test_slots_for_a_time() -> None:
    assert PrefillCost(5.0, 0.5).slots(10.0) == 10
    assert PrefillCost(5.0, 0.5).slots(5.0) == 0
    assert PrefillCost(5.0, 0.5).slots(1.0) == 0
    assert PrefillCost(5.0, 0.0).slots(6.0) > 10**6
