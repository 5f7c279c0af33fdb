"""Who computes what in the next step. Counts only; not thread-safe: the engine holds its lock.

Admission is in order of arrival and by slots: a sequence enters when the positions that it may ever need are free, so
nothing that runs is ever put out again. In a step every sequence makes progress: one token for each that decodes, and
the rest of the step's tokens shared evenly among those still in prefill. So a long prefill neither stalls the streams
that run nor a short question that came after it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockrag.decoder.sequence import Sequence
from blockrag.errors import OverloadedError, SettingsError

if TYPE_CHECKING:
    from blockrag.modeling.slots import SequenceState


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of the engine; the same names as in the decoder's settings, where choosing them is explained."""

    max_sequences: int = 16
    max_waiting: int = 64
    max_batch_tokens: int = 1024
    slots: int = 65_536

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


class Scheduler:
    """The waiting queue and the running sequences."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.used_slots = 0

    def submit(self, sequence: Sequence, retry_after_ms: int) -> None:
        """Take a sequence in, at once when there is room for it.

        Raises ``OverloadedError`` when the waiting queue is full.
        """
        if self.full:
            raise OverloadedError(f"the decoder has {len(self.waiting)} requests waiting", retry_after_ms)
        self.waiting.append(sequence)
        self._admit()

    @property
    def full(self) -> bool:
        """Whether ``submit`` would refuse."""
        return len(self.waiting) >= self.limits.max_waiting

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that waits or runs; its slots go to those that wait."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.used_slots -= sequence.slots
        else:
            self.waiting.remove(sequence)
        self._admit()

    def sequences(self) -> list[Sequence]:
        """All of them."""
        return [*self.running, *self.waiting]

    def plan(self) -> list[Work]:
        """The next step: at least one token for every composed sequence, at most max_batch_tokens together."""
        composed = [(sequence, state) for sequence in self.running if (state := sequence.state) is not None]
        work = [_work(sequence, state, 1) for sequence, state in composed if sequence.decoding]
        prefilling = [item for item in composed if not item[0].decoding]
        prefilling.sort(key=lambda item: item[0].remaining)
        budget = self.limits.max_batch_tokens - len(work)
        for place, (sequence, state) in enumerate(prefilling):
            # Shortest first, each at most an even share of what is left: what a short one leaves goes to the others.
            share = budget // (len(prefilling) - place)
            piece = min(share, sequence.remaining)
            work.append(_work(sequence, state, piece))
            budget -= piece
        return work

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.max_sequences:
            if self.used_slots + self.waiting[0].slots > self.limits.slots:
                return
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            self.used_slots += sequence.slots


def _work(sequence: Sequence, state: SequenceState, count: int) -> Work:
    return Work(sequence, state, sequence.tokens[sequence.computed : sequence.computed + count])
