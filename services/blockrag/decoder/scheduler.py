"""Who computes what in the next step. Counts only; not thread-safe: the engine holds its lock.

Admission is by slots: a sequence enters when the positions that it may ever need are free, so nothing that runs is ever
put out again. Tenants take turns, of one tenant the order is that of arrival. Where there are several, a quarter of the
places is for those that hold less than an even share: one that fills the queue does not keep another waiting for its
own answers to end.

In a step every sequence makes progress: one token for each that decodes, and the rest of the step's tokens shared
evenly among those still in prefill. So a long prefill neither stalls the streams that run nor a short question that
came after it. Only a tenant in excess, which runs more than an even part and has others waiting, has half as large a
part in a step as those that are not; when they have nothing to compute, it has the steps to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockrag.decoder.sequence import Sequence
from blockrag.errors import OverloadedError, SettingsError
from blockrag.fairness import FairQueue, has_room

if TYPE_CHECKING:
    from blockrag.modeling.slots import SequenceState


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of the engine; the same names as in the decoder's settings, where choosing them is explained."""

    max_sequences: int = 16
    max_waiting: int = 64
    max_batch_tokens: int = 1024
    slots: int = 65_536
    several_tenants: bool = False
    """Whether none of them may take all places."""

    def __post_init__(self) -> None:
        if min(self.max_sequences, self.max_waiting, self.slots) < 1:
            raise SettingsError("decoder: max_sequences, max_waiting and slots must be positive")
        if self.max_batch_tokens <= self.max_sequences:
            # Every sequence makes progress in every step only if a step has a token for each.
            raise SettingsError("decoder.max_batch_tokens must be greater than decoder.max_sequences")


@dataclass(frozen=True)
class Work:
    """Tokens of one sequence to compute in a step."""

    sequence: Sequence
    state: SequenceState
    token_ids: list[int]


_KEPT = 4
"""One in so many places, and slots, is for tenants that hold less than an even share."""


@dataclass(frozen=True)
class _Held:
    """What a tenant's sequences hold."""

    sequences: int = 0
    slots: int = 0

    def plus(self, sequence: Sequence) -> _Held:
        return _Held(self.sequences + 1, self.slots + sequence.slots)

    def minus(self, sequence: Sequence) -> _Held:
        return _Held(self.sequences - 1, self.slots - sequence.slots)


_NOTHING = _Held()


class Scheduler:
    """The waiting queue and the running sequences."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []
        self._turn: dict[str, int] = {}  # of each tenant that was in excess, how many of its sequences had theirs
        self._held: dict[str, _Held] = {}  # by tenant, of those that run
        self.used_slots = 0

    def submit(self, sequence: Sequence, retry_after_ms: int) -> None:
        """Take a sequence in, at once when there is room for it.

        Raises ``OverloadedError`` when the waiting queue is full.
        """
        tenant = sequence.request.tenant
        self.check(tenant, retry_after_ms)
        self.waiting.append(tenant, sequence, sequence.slots)
        self._admit()

    def check(self, tenant: str, retry_after_ms: int) -> None:
        """Raises the ``OverloadedError`` that ``submit`` would raise now for a sequence of the tenant."""
        waiting, places = len(self.waiting), self.limits.max_waiting
        if not self.limits.several_tenants:
            if waiting >= places:
                raise OverloadedError(f"the decoder has {waiting} requests waiting", retry_after_ms)
        elif not has_room(held := self.waiting.of(tenant), waiting, places):
            raise OverloadedError(f"the decoder has {held} requests of {tenant} waiting", retry_after_ms)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that waits or runs; its slots go to those that wait."""
        tenant = sequence.request.tenant
        if sequence in self.running:
            self.running.remove(sequence)
            self.used_slots -= sequence.slots
            left = self._held.pop(tenant).minus(sequence)
            if left.sequences:
                self._held[tenant] = left
        else:
            self.waiting.remove(tenant, sequence)
        self._admit()

    def sequences(self) -> list[Sequence]:
        """All of them."""
        return [*self.running, *self.waiting]

    def plan(self) -> list[Work]:
        """The next step: at least one token for each sequence that takes part, at most max_batch_tokens together."""
        excess = self._excess()
        chosen = self._of_this_step(excess)
        composed = [(sequence, state) for sequence in chosen if (state := sequence.state) is not None]
        work = [_work(sequence, state, 1) for sequence, state in composed if sequence.decoding]
        prefilling = [item for item in composed if not item[0].decoding]
        prefilling.sort(key=lambda item: (item[0].request.tenant in excess, item[0].remaining))
        budget = self.limits.max_batch_tokens - len(work)
        even = sum(item.sequence.request.tenant not in excess for item in work)
        for place, (sequence, state) in enumerate(prefilling):
            # Shortest first, each at most an even share of what is left: what a short one leaves goes to the others.
            piece = min(budget // (len(prefilling) - place), sequence.remaining)
            if sequence.request.tenant in excess:
                piece = min(piece, max(1, even))
            else:
                even += piece
            work.append(_work(sequence, state, piece))
            budget -= piece
        return work

    def _excess(self) -> frozenset[str]:
        """Tenants that have sequences waiting though they run more than an even part of all that run."""
        return frozenset(
            tenant
            for tenant, held in self._held.items()
            if self.limits.several_tenants
            and self.waiting.of(tenant)
            and held.sequences * len(self._held) > len(self.running)
        )

    def _of_this_step(self, excess: frozenset[str]) -> list[Sequence]:
        """All that run; of a tenant in excess half as many as of the tenants that are not, in turns.

        A step takes longer for each sequence and token in it: the many of a tenant that asks for more than its places
        would slow another's few down.
        """
        if not excess:
            return self.running
        chosen = [sequence for sequence in self.running if sequence.request.tenant not in excess]
        most = min(len(chosen), max(1, len(chosen) // 2))
        for tenant in excess:
            own = [sequence for sequence in self.running if sequence.request.tenant == tenant]
            start = self._turn.get(tenant, 0)
            chosen += [own[(start + place) % len(own)] for place in range(min(most, len(own)))]
            self._turn[tenant] = start + most
        return chosen

    def _admit(self) -> None:
        while self._admit_one():
            pass

    def _admit_one(self) -> bool:
        if len(self.running) >= self.limits.max_sequences:
            return False
        for tenant, sequence in self.waiting.turns():
            if not self._may_run(tenant, sequence):
                continue
            if self.used_slots + sequence.slots > self.limits.slots:
                return False  # what is small does not overtake: what is large would wait for ever
            self.waiting.take(tenant)
            self.running.append(sequence)
            self.used_slots += sequence.slots
            self._held[tenant] = self._held.get(tenant, _NOTHING).plus(sequence)
            return True
        return False

    def _may_run(self, tenant: str, sequence: Sequence) -> bool:
        """Whether the tenant's share has room for a sequence, or what nobody's share is."""
        if not self.limits.several_tenants or tenant not in self._held:
            return True
        limits, held = self.limits, self._held[tenant].plus(sequence)
        shares = 1 + len({*self._held, *(tenant for tenant, _ in self.waiting.turns())})  # one for whoever comes next
        if held.sequences * shares <= limits.max_sequences and held.slots * shares <= limits.slots:
            return True
        return (
            len(self.running) < limits.max_sequences - limits.max_sequences // _KEPT
            and self.used_slots + sequence.slots <= limits.slots - limits.slots // _KEPT
        )


def _work(sequence: Sequence, state: SequenceState, count: int) -> Work:
    return Work(sequence, state, sequence.tokens[sequence.computed : sequence.computed + count])
