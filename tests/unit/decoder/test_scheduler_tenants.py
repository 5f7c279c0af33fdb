"""Tenants at the decoder: turns in the queue, places kept free, and a simulation of one that asks for too much."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from blockrag.decoder.scheduler import EngineLimits, Scheduler
from blockrag.decoder.sequence import GenerationRequest, SamplingParams, Sequence
from blockrag.errors import OverloadedError
from tests.unit.decoder.fakes import CollectingSink, FakeState, LetterDetokenizer

FIXED_S, TOKEN_S = 0.009, 0.0012
"""Of a step: about what the bundled reader takes on two cores."""


def sequence(tenant: str, *, prompt: int = 30, answer: int = 4, now: float = 0.0) -> Sequence:
    request = GenerationRequest("r", (), tuple(range(prompt)), SamplingParams(max_tokens=answer), tenant=tenant)
    return Sequence(request, LetterDetokenizer(), CollectingSink(), now)


def limits(*, several: bool = True, slots: int = 32_768, waiting: int = 64) -> EngineLimits:
    return EngineLimits(16, waiting, 512, slots, several_tenants=several)


def tenants(sequences: list[Sequence]) -> Counter[str]:
    return Counter(each.request.tenant for each in sequences)


def test_one_tenant_fills_neither_the_places_nor_the_queue() -> None:
    scheduler = Scheduler(limits(waiting=8))
    with pytest.raises(OverloadedError, match="requests of acme waiting"):
        for _ in range(40):
            scheduler.submit(sequence("acme"), 100)
    assert len(scheduler.running) == 12
    assert scheduler.waiting.of("acme") == 4
    for _ in range(4):
        scheduler.submit(sequence("umbrella"), 100)
    assert tenants(scheduler.running) == {"acme": 12, "umbrella": 4}
    scheduler.submit(sequence("umbrella"), 100)
    scheduler.remove(scheduler.running[0])
    assert tenants(scheduler.running) == {"acme": 11, "umbrella": 5}


def test_without_keys_there_is_one_tenant_and_it_has_everything() -> None:
    scheduler = Scheduler(limits(several=False, waiting=8))
    for _ in range(24):
        scheduler.submit(sequence("public"), 100)
    assert (len(scheduler.running), len(scheduler.waiting)) == (16, 8)


def test_a_share_of_the_slots_is_kept_too_but_a_large_prompt_gets_in() -> None:
    scheduler = Scheduler(limits(slots=1000))
    for _ in range(9):
        scheduler.submit(sequence("acme", prompt=96), 100)
    assert scheduler.used_slots == 700
    scheduler.submit(sequence("umbrella", prompt=190), 100)
    assert tenants(scheduler.running) == {"acme": 7, "umbrella": 1}
    for each in list(scheduler.sequences()):
        scheduler.remove(each)
    scheduler.submit(sequence("acme", prompt=990), 100)
    assert scheduler.used_slots == 994


def test_what_is_large_is_not_overtaken_for_ever() -> None:
    scheduler = Scheduler(limits(slots=1000))
    for _ in range(4):
        scheduler.submit(sequence("acme", prompt=96), 100)
    scheduler.submit(sequence("umbrella", prompt=790), 100)
    for _ in range(20):
        scheduler.submit(sequence("acme", prompt=96), 100)
        if tenants(scheduler.running)["umbrella"]:
            break
        scheduler.remove(scheduler.running[0])
    assert tenants(scheduler.running)["umbrella"] == 1


def test_in_a_step_a_tenant_in_excess_gets_half_of_what_the_others_get_and_in_turns() -> None:
    scheduler = Scheduler(limits())
    for _ in range(20):
        scheduler.submit(sequence("acme"), 100)
    scheduler.submit(sequence("umbrella"), 100)
    for each in scheduler.running:
        each.composed(FakeState(0, 40), 0.0)  # type: ignore[arg-type]
    seen: set[int] = set()
    for _ in range(12):
        work = [item.sequence for item in scheduler.plan()]
        assert tenants(work) == {"acme": 1, "umbrella": 1}
        seen |= {id(each) for each in work}
    assert len(seen) == 13
    for _ in range(3):
        scheduler.submit(sequence("umbrella"), 100)
    for each in scheduler.running:
        if each.state is None:
            each.composed(FakeState(0, 40), 0.0)  # type: ignore[arg-type]
    assert tenants([item.sequence for item in scheduler.plan()]) == {"acme": 2, "umbrella": 4}


@dataclass
class Run:
    """What became of each tenant's requests."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def p95(self, tenant: str) -> float:
        times = sorted(self.seconds[tenant])
        return times[int(0.95 * len(times))]


def simulate(rates: dict[str, float], *, several: bool, until: float = 600.0) -> Run:
    """Open loops of requests a second; a step takes as long as it has tokens. Same seed, same run."""
    arrivals = []
    for tenant, rate in rates.items():
        draw, at = random.Random(tenant), 0.0
        while (at := at + draw.expovariate(rate)) < until:
            arrivals.append((at, tenant, draw.randint(12, 36)))
    arrivals.sort(reverse=True)
    scheduler, run, now = Scheduler(limits(several=several)), Run({tenant: [] for tenant in rates}), 0.0
    arrived: dict[Sequence, float] = {}
    while arrivals or scheduler.running:
        while arrivals and (arrivals[-1][0] <= now or not scheduler.running):
            at, tenant, answer = arrivals.pop()
            now = max(now, at)
            made = sequence(tenant, answer=answer, now=now)
            try:
                scheduler.submit(made, 0)
            except OverloadedError:
                run.refused[tenant] += 1
            else:
                arrived[made] = at
        for each in scheduler.running:
            if each.state is None:
                each.composed(FakeState(0, 66), now)  # type: ignore[arg-type]
        work = scheduler.plan()
        now += FIXED_S + TOKEN_S * sum(len(item.token_ids) for item in work)
        for item in work:
            item.sequence.computed += len(item.token_ids)
            if item.sequence.remaining:
                continue
            event = item.sequence.accept(1, frozenset(), now)
            if event is not None and event.finish is not None:
                scheduler.remove(item.sequence)
                run.seconds[item.sequence.request.tenant].append(now - arrived[item.sequence])
    return run


def test_ten_times_its_share_is_hardly_felt_by_another() -> None:
    capacity = 1 / (24 * (FIXED_S / 16 + TOKEN_S) + 30 * TOKEN_S)
    share = capacity / 4  # both together need half of it
    alike = simulate({"umbrella": share, "acme": share}, several=True)
    greedy = simulate({"umbrella": share, "acme": 10 * share}, several=True)
    assert greedy.p95("umbrella") <= 1.2 * alike.p95("umbrella")
    assert not greedy.refused["umbrella"]
    assert greedy.refused["acme"] > 1000
    # In order of arrival it would be felt.
    unfair = simulate({"umbrella": share, "acme": 10 * share}, several=False)
    assert unfair.p95("umbrella") > 2 * greedy.p95("umbrella")
    assert unfair.refused["umbrella"]
    # While nobody is in excess, sharing costs next to nothing.
    before = simulate({"umbrella": share, "acme": share}, several=False)
    assert alike.p95("umbrella") <= 1.1 * before.p95("umbrella")
