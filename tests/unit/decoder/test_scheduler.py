from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.scheduler import EngineLimits, Scheduler
from blockrag.decoder.sequence import GenerationRequest, SamplingParams, Sequence
from blockrag.errors import OverloadedError, SettingsError
from tests.unit.decoder.fakes import CollectingSink, FakeState, LetterDetokenizer


def _sequence(prompt: int, max_tokens: int = 4) -> Sequence:
    request = GenerationRequest("r", (), tuple(range(prompt)), SamplingParams(max_tokens=max_tokens))
    return Sequence(request, LetterDetokenizer(), CollectingSink(), 0.0)


def _running(scheduler: Scheduler, prompt: int, *, decoding: bool = False) -> Sequence:
    sequence = _sequence(prompt)
    scheduler.submit(sequence, 0)
    sequence.composed(FakeState(0, prompt + 4), 0.0)  # type: ignore[arg-type]
    if decoding:
        sequence.computed = prompt
        sequence.accept(1, frozenset(), 0.0)
    return sequence


def _limits(**fields: int) -> EngineLimits:
    return EngineLimits(**{"max_sequences": 4, "max_waiting": 2, "max_batch_tokens": 64, "slots": 100, **fields})


def test_admission_is_by_slots_and_in_order_of_arrival() -> None:
    scheduler = Scheduler(_limits())
    first, big, small = _sequence(50, 10), _sequence(60, 10), _sequence(5, 5)
    for sequence in (first, big, small):
        scheduler.submit(sequence, 0)
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [big, small]  # the small one would fit, but does not overtake
    scheduler.remove(first)
    assert scheduler.running == [big, small]
    assert scheduler.used_slots == 80


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = Scheduler(_limits(max_sequences=1))
    for _ in range(3):
        scheduler.submit(_sequence(5), 0)
    with pytest.raises(OverloadedError) as caught:
        scheduler.submit(_sequence(5), 750)
    assert caught.value.retry_after_ms == 750
    assert len(scheduler.waiting) == 2


def test_removing_one_that_waits_keeps_the_count() -> None:
    scheduler = Scheduler(_limits(max_sequences=1))
    running, waiting = _sequence(5), _sequence(5)
    scheduler.submit(running, 0)
    scheduler.submit(waiting, 0)
    scheduler.remove(waiting)
    assert scheduler.used_slots == running.slots
    scheduler.remove(running)
    assert scheduler.used_slots == 0


def test_decoding_goes_on_beside_a_long_prefill() -> None:
    scheduler = Scheduler(_limits(slots=10_000, max_batch_tokens=32))
    stream, long = _running(scheduler, 10, decoding=True), _running(scheduler, 500)
    pieces = {item.sequence: item.token_ids for item in scheduler.plan()}
    assert pieces[stream] == [1]
    assert pieces[long] == list(range(31))


def test_a_short_prompt_is_not_held_up_by_a_long_one() -> None:
    scheduler = Scheduler(_limits(slots=10_000))
    long, short = _running(scheduler, 500), _running(scheduler, 20)
    pieces = {item.sequence: len(item.token_ids) for item in scheduler.plan()}
    assert pieces == {short: 20, long: 44}


def test_long_prompts_share_a_step_evenly() -> None:
    scheduler = Scheduler(_limits(slots=10_000))
    prompts = [_running(scheduler, size) for size in (300, 200, 400)]
    pieces = {item.sequence: len(item.token_ids) for item in scheduler.plan()}
    assert sorted(pieces[prompt] for prompt in prompts) == [21, 21, 22]


def test_a_sequence_without_a_slot_list_is_not_planned() -> None:
    scheduler = Scheduler(_limits())
    scheduler.submit(_sequence(5), 0)
    assert scheduler.plan() == []


@given(
    prompts=st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=6),
    budget=st.integers(7, 128),
)
def test_every_step_serves_everyone_within_the_budget(prompts: list[tuple[int, bool]], budget: int) -> None:
    scheduler = Scheduler(EngineLimits(6, 1, budget, 100_000))
    sequences = [_running(scheduler, size, decoding=decoding) for size, decoding in prompts]
    work = scheduler.plan()
    assert {id(item.sequence) for item in work} == {id(sequence) for sequence in sequences}
    assert all(item.token_ids for item in work)
    used = sum(len(item.token_ids) for item in work)
    assert used <= budget
    # Nothing is left unused while somebody could still use it.
    assert used == min(budget, sum(sequence.remaining for sequence in sequences))


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(SettingsError, match="max_batch_tokens"):
        EngineLimits(max_sequences=16, max_batch_tokens=16)
    with pytest.raises(SettingsError, match="positive"):
        EngineLimits(slots=0)
