"""The cluster, event by event: questions arrive, blocks come from their tiers, decoders step.

What is left out: search and gateway take a constant time and never queue, tenants are one, nothing fails. The tiers
forget what was used last, as the served ones do. An encoder and a decoder of one machine share its cores: while both
work, each takes twice as long.

And how many machines a load needs.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from operator import itemgetter

from blockrag.lru import Lru
from blockrag.simulation.scenario import Caching, Scenario, StageTimes, percentile, prefill_seconds
from blockrag.simulation.workload import Asked, Workload

TIERS = ("decoder", "store", "network", "disk", "encoded")
"""Where a passage's KV came from; ``encoded`` also counts what is prefilled in the prompt."""

_SHARED = 2.0
_HASH = 0x9E3779B97F4A7C15


@dataclass
class _Running:
    asked_at: float
    slots: int
    new_tokens: int
    left: int
    counted: bool


@dataclass
class _Machine:
    index: int
    l1: Lru[object, tuple[int, float]]
    store: Lru[int, tuple[int, float]]
    """By block: its bytes, and when it is there."""
    disk: Lru[int, int]
    waiting: deque[_Running] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)
    expected: int = 0
    """Questions sent here whose blocks are on their way."""
    stepping: bool = False
    encoder_free: float = 0.0
    link_free: float = 0.0
    decoding_s: float = 0.0
    encoding_s: float = 0.0
    sending_s: float = 0.0

    @property
    def queue(self) -> int:
        return self.expected + len(self.waiting) + len(self.running)


@dataclass(frozen=True)
class Outcome:
    """What was found. Times in seconds."""

    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    shares: dict[str, float]
    """By tier, the share of passages that came from it."""
    decoders: float
    """Share of the time that decoders computed."""
    encoders: float
    """Share of the time that encoders computed."""
    links: float
    """Share of the time that the busiest machine's network link sent."""
    growing: bool
    """Waiting got longer until the end: more comes than is answered."""
    machine_seconds: float
    """Of all machines, for 1,000 answers."""


def simulate(scenario: Scenario, times: StageTimes) -> Outcome:
    """Run the scenario's questions through its cluster."""
    return _Simulation(scenario, times).run()


class _Simulation:
    def __init__(self, scenario: Scenario, times: StageTimes) -> None:
        self._scenario = scenario
        self._times = times
        self._random = random.Random(scenario.seed)
        self._turn = itertools.count()
        self._events: list[tuple[float, int, int, _Running | None]] = []
        self._order = itertools.count()
        self._tiers: Counter[str] = Counter()
        self._first_tokens: list[float] = []
        # prefix caching has all the memory that block caching divides between decoder and store
        l1_mb = scenario.l1_mb + (scenario.store_mb if scenario.caching == "prefix" else 0)
        block = scenario.block_bytes
        self._machines = [
            _Machine(
                index,
                Lru(scenario.held_blocks(l1_mb) * block, itemgetter(0)),
                Lru(scenario.held_blocks(scenario.store_mb) * block, itemgetter(0)),
                Lru(scenario.held_blocks(scenario.disk_mb) * block, int),
            )
            for index in range(scenario.machines)
        ]
        # encoders by when they are free: only the least busy matters
        self._encoders = [(0.0, index) for index in range(scenario.machines)]

    def run(self) -> Outcome:
        scenario = self._scenario
        workload = Workload(scenario)
        if scenario.caching == "block":
            self._fill(workload)
        warming = scenario.questions // 5
        started = ended = 0.0
        for number, asked in enumerate(workload.questions(warming + scenario.questions)):
            self._run_until(asked.at)
            if number == warming:
                self._tiers.clear()
                for machine in self._machines:
                    machine.decoding_s = machine.encoding_s = machine.sending_s = 0.0
                started = asked.at
            self._arrive(asked, counted=number >= warming)
            ended = asked.at
        span = max(ended - started, 1e-9)
        computed = [
            sum(machine.decoding_s for machine in self._machines) / span / scenario.machines,
            sum(machine.encoding_s for machine in self._machines) / span / scenario.machines,
            max(machine.sending_s for machine in self._machines) / span,
        ]
        backlog = sum(machine.queue for machine in self._machines)
        self._run_until(float("inf"))
        tenth = max(1, len(self._first_tokens) // 10)
        early, late = self._first_tokens[:tenth], self._first_tokens[-tenth:]
        total = sum(self._tiers.values())
        return Outcome(
            ttft_p50=percentile(self._first_tokens, 0.5),
            ttft_p95=percentile(self._first_tokens, 0.95),
            ttft_p99=percentile(self._first_tokens, 0.99),
            shares={tier: self._tiers[tier] / total for tier in TIERS},
            decoders=computed[0],
            encoders=computed[1],
            links=computed[2],
            growing=sum(late) > 3 * sum(early) and backlog > 2 * scenario.machines * scenario.max_sequences,
            machine_seconds=1000 * scenario.machines / scenario.rate,
        )

    def _fill(self, workload: Workload) -> None:
        """Tiers as they stand after long use: the most popular blocks, used in that order."""
        scenario, block = self._scenario, self._scenario.block_bytes
        kept = scenario.held_blocks(scenario.store_mb + scenario.disk_mb) * scenario.machines
        for passage in reversed(workload.by_popularity(kept)):
            owner = self._owner(passage)
            if scenario.store_mb:
                owner.store.put(passage, (block, 0.0))
            owner.disk.put(passage, block)

    def _owner(self, passage: int) -> _Machine:
        return self._machines[(passage * _HASH & 0xFFFFFFFFFFFFFFFF) * len(self._machines) >> 64]

    def _arrive(self, asked: Asked, *, counted: bool) -> None:
        machine = self._route(asked)
        now = asked.at + self._times.before_s
        if self._scenario.caching == "block":
            ready = max((self._block(machine, passage, now) for passage in asked.passages), default=now)
            new = 0
        else:
            ready, new = now, self._prompt(machine, asked)
        slots = len(asked.passages) * self._scenario.passage_tokens
        machine.expected += 1
        self._push(ready, machine, _Running(asked.at, slots, new, self._scenario.answer_tokens, counted))

    def _route(self, asked: Asked) -> _Machine:
        machines, routing = self._machines, self._scenario.routing
        if len(machines) == 1:
            return machines[0]
        if routing == "random":
            return self._random.choice(machines)
        if routing == "round-robin":
            return machines[next(self._turn) % len(machines)]
        if routing == "held":
            # in the order of a question's own hash, so that those about one topic meet
            first = asked.passages[0] // self._scenario.variety * _HASH & 0xFFFFFFFFFFFFFFFF
            near = [machines[(first + step * _HASH & 0xFFFFFFFFFFFFFFFF) * len(machines) >> 64] for step in range(4)]
            return min(near, key=lambda each: each.queue - sum(passage in each.l1 for passage in asked.passages))
        one, other = self._random.sample(range(len(machines)), 2)
        return min(machines[one], machines[other], key=lambda each: each.queue)

    def _block(self, machine: _Machine, passage: int, now: float) -> float:
        """When the passage's block is in the decoder."""
        found = machine.l1.get(passage)
        if found is not None:
            self._tiers["decoder"] += 1
            return max(now, found[1])
        ready = self._fetch(machine, passage, now + self._times.hop_s)
        machine.l1.put(passage, (self._scenario.block_bytes, ready))
        return ready

    def _fetch(self, machine: _Machine, passage: int, now: float) -> float:
        times, nbytes = self._times, self._scenario.block_bytes
        owner = self._owner(passage)
        local = owner is machine
        held = owner.store.get(passage)
        if held is not None:
            tier, there = "store" if local else "network", max(now, held[1])
        elif owner.disk.get(passage) is not None:
            tier, there = "disk", now + nbytes * times.disk_s
        else:
            tier, there = "encoded", self._encode(now)
        self._tiers[tier] += 1
        if held is None:
            owner.store.put(passage, (nbytes, there))
            owner.disk.put(passage, nbytes)
        if local:
            return there + nbytes * times.copy_s
        owner.link_free = max(there, owner.link_free) + nbytes * times.network_s
        owner.sending_s += nbytes * times.network_s
        return owner.link_free + times.hop_s

    def _encode(self, now: float) -> float:
        free, index = heapq.heappop(self._encoders)
        machine = self._machines[index]
        took = self._scenario.passage_tokens * self._times.encode_s
        machine.encoding_s += took
        if machine.stepping:
            took *= _SHARED
        done = max(now, free) + took
        machine.encoder_free = done
        heapq.heappush(self._encoders, (done, index))
        return done

    def _prompt(self, machine: _Machine, asked: Asked) -> int:
        """Passage tokens to prefill, where only a prompt that began alike is found again."""
        held = 0
        if self._scenario.caching == "prefix":
            for length in range(1, len(asked.passages) + 1):
                prefix = asked.passages[:length]
                found = machine.l1.get(prefix) is not None
                if found and held == length - 1:
                    held = length
                elif not found:
                    machine.l1.put(prefix, (self._scenario.block_bytes, 0.0))
        self._tiers["decoder"] += held
        self._tiers["encoded"] += len(asked.passages) - held
        return (len(asked.passages) - held) * self._scenario.passage_tokens

    def _push(self, at: float, machine: _Machine, question: _Running | None) -> None:
        heapq.heappush(self._events, (at, next(self._order), machine.index, question))

    def _run_until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            now, _, index, question = heapq.heappop(self._events)
            machine = self._machines[index]
            if question is None:
                machine.stepping = False
            else:
                machine.expected -= 1
                machine.waiting.append(question)
            if not machine.stepping and (machine.waiting or machine.running):
                self._step(machine, now)

    def _step(self, machine: _Machine, now: float) -> None:
        times = self._times
        new: list[_Running] = []
        while machine.waiting and len(machine.running) + len(new) < self._scenario.max_sequences:
            new.append(machine.waiting.popleft())
        took = sum(prefill_seconds(times, each.new_tokens, each.slots - each.new_tokens) for each in new)
        if machine.running:
            # beside a prefill the weights are read once anyway
            took += times.stream_s * (len(machine.running) - 1) + (0.0 if new else times.step_s)
            took += times.step_slot_s * sum(each.slots for each in machine.running)
        machine.decoding_s += took
        if machine.encoder_free > now:
            took *= _SHARED
        done = now + took
        self._first_tokens += [done - each.asked_at for each in new if each.counted]
        machine.running += new
        for each in machine.running:
            each.left -= 1
        machine.running = [each for each in machine.running if each.left > 0]
        machine.stepping = True
        self._push(done, machine, None)


MOST_MACHINES = 65_536
CACHINGS: tuple[Caching, ...] = ("block", "prefix", "none")

_SPAN_S = 20.0
"""A run lasts at least so long: a shorter one ends before a queue shows."""
_IDLE = 0.02
"""Where machines compute less than this share of the time, more of them change nothing."""


def smallest(scenario: Scenario, times: StageTimes, target_s: float) -> tuple[Scenario, Outcome] | None:
    """The scenario on the fewest machines whose 95th percentile of the time to first token is within ``target_s``.

    By doubling and halving, so within an eighth of the fewest. None: more than ``MOST_MACHINES`` would be needed, or
    the target is missed where nothing waits.
    """

    def run(machines: int) -> tuple[Scenario, Outcome]:
        questions = max(scenario.questions, int(_SPAN_S * scenario.rate))
        tried = replace(scenario, machines=machines, questions=questions)
        return tried, simulate(tried, times)

    def keeps(outcome: Outcome) -> bool:
        return outcome.ttft_p95 <= target_s and not outcome.growing

    machines, found = 1, run(1)
    while not keeps(found[1]):
        machines *= 2
        if machines > MOST_MACHINES or max(found[1].decoders, found[1].encoders) < _IDLE:
            return None
        found = run(machines)
    too_few = machines // 2
    while machines - too_few > max(1, machines // 8):
        middle = (machines + too_few) // 2
        tried = run(middle)
        if keeps(tried[1]):
            machines, found = middle, tried
        else:
            too_few = middle
    return found


def beside_others(scenario: Scenario, times: StageTimes, target_s: float) -> list[tuple[Scenario, Outcome | None]]:
    """The fewest machines with blocks, with prefix caching and without any; an outcome of None: none are enough."""
    rows: list[tuple[Scenario, Outcome | None]] = []
    for caching in CACHINGS:
        asked = replace(scenario, caching=caching)
        rows.append(smallest(asked, times, target_s) or (asked, None))
    return rows
