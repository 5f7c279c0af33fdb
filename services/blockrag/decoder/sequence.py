"""A sequence: one prompt and the text that grows from it. The nouns of the engine, how next tokens are chosen,
and the way of events from its thread to a coroutine."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from blockrag.decoder.detokenizer import Detokenizer, StopScanner
from blockrag.errors import BlockragError, DataError, InvalidRequestError
from blockrag.limits import MAX_TEMPERATURE


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence's tokens are chosen and when they end.

    Raises ``InvalidRequestError`` naming the field of the ``Sampling`` message for a value out of range.
    """

    max_tokens: int
    """Most tokens generated; at least 1."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1: off."""
    seed: int = 0
    """Seed of the sequence's random stream, in [0, 2**64)."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequestError("sampling.max_tokens", f"must be at least 1, is {self.max_tokens}")
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE:  # also refuses NaN
            raise InvalidRequestError("sampling.temperature", f"must be in [0, {MAX_TEMPERATURE:g}]")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError("sampling.top_p", "must be in (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise InvalidRequestError("sampling.seed", "must be in [0, 2**64)")
        if any(not text for text in self.stop):
            raise InvalidRequestError("sampling.stop", "holds an empty string")


class Sampler:
    """Chooses the tokens of one sequence.

    The random stream belongs to the sequence and lives on the CPU: the same seed draws the same numbers on any
    device and whatever else is in the batch.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.greedy = params.temperature == 0.0
        self._temperature = params.temperature
        self._top_p = params.top_p
        self._generator = None if self.greedy else torch.Generator().manual_seed(params.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """A token id from one row of logits, shape [vocab], by inversion of the cumulative distribution."""
        number = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        wide = logits.double()
        # from the largest down: a temperature near 0 would make infinities of them, whose softmax is no number
        probabilities = torch.softmax((wide - wide.max()) / self._temperature, dim=-1)
        if self._top_p < 1.0:
            ordered, ids = probabilities.sort(descending=True, stable=True)
            cumulative = ordered.cumsum(dim=-1)
            # The nucleus is the smallest set whose mass reaches top_p; the likeliest token is always in it.
            kept = int((cumulative < self._top_p).sum().item()) + 1
            cumulative = cumulative[:kept]
            return int(ids[_invert(cumulative, number)].item())
        return _invert(probabilities.cumsum(dim=-1), number)


def sample(logits: torch.Tensor, samplers: list[Sampler]) -> list[int | DataError]:
    """One token id per row; a row without a finite maximum gives an error instead, and harms no other row.

    Args:
        logits: shape [rows, vocab], float32, on any device.
        samplers: one per row.
    """
    highest, greedy_ids = logits.max(dim=-1)  # a NaN anywhere in a row is its maximum
    tokens: list[int | DataError] = []
    for row, (value, token) in enumerate(zip(highest.tolist(), greedy_ids.tolist(), strict=True)):
        if not math.isfinite(value):
            tokens.append(DataError("the model's logits are not finite"))
        elif samplers[row].greedy:
            tokens.append(token)
        else:
            tokens.append(samplers[row].draw(logits[row]))
    return tokens


def _invert(cumulative: torch.Tensor, number: float) -> int:
    target = cumulative[-1:] * number
    index = int(torch.searchsorted(cumulative, target, right=True).item())
    return min(index, cumulative.shape[0] - 1)


if TYPE_CHECKING:
    from blockrag.modeling.slots import SequenceState, Slots

Reason = Literal["end", "stop", "length"]
"""``end``: the model ended its answer; ``stop``: a stop string; ``length``: max_tokens."""


@dataclass(frozen=True)
class GenerationRequest:
    """What the engine needs to generate."""

    request_id: str
    """For logs."""
    blocks: tuple[Slots, ...]
    """Cached part of the prompt, blocks and slices of blocks, in order; empty when the whole prompt is prefilled."""
    token_ids: tuple[int, ...]
    """Tokens to prefill behind the blocks; at least one."""
    sampling: SamplingParams
    deadline: float | None = None
    """On the engine's clock (``time.monotonic``), in seconds."""
    released: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called once, from the engine's thread, when the engine no longer uses ``blocks``. Not when submit refuses."""
    tenant: str = ""
    """Whose it is: tenants take turns."""

    @property
    def prompt_slots(self) -> int:
        """Positions that the prompt takes."""
        return sum(block.num_slots for block in self.blocks) + len(self.token_ids)


@dataclass(frozen=True)
class StageSeconds:
    """Wall time of a sequence's stages."""

    queue: float
    """Until a place was free."""
    compose: float
    """Bringing the blocks into the prompt's slot list."""
    prefill: float
    """Until the first token."""
    decode: float
    """From the first token to the last."""


@dataclass(frozen=True)
class Finish:
    """How a sequence ended."""

    reason: Reason
    completion_tokens: int
    """Tokens generated, the one that ends the answer not counted."""
    stages: StageSeconds


@dataclass(frozen=True)
class Event:
    """New text of a sequence, its finish, or its error."""

    text: str = ""
    tokens: int = 0
    """Tokens that were generated since the event before."""
    finish: Finish | None = None
    error: BlockragError | None = None


EventSink = Callable[[Event], object]
"""Where a sequence's events go; called from the engine's thread, must not block."""


class Sequence:
    """A request on its way through the engine. Only the engine's thread changes it, but for ``cancelled``."""

    def __init__(self, request: GenerationRequest, detokenizer: Detokenizer, sink: EventSink, now: float) -> None:
        self.request = request
        self.sink = sink
        self.sampler = Sampler(request.sampling)
        self.state: SequenceState | None = None
        self.slots = request.prompt_slots + request.sampling.max_tokens
        self.cancelled = False
        self.tokens = list(request.token_ids)
        self.computed = 0
        self.generated = 0
        self._detokenizer = detokenizer
        self._stops = StopScanner(request.sampling.stop)
        self._unreported = 0
        self._submitted_at = self._admitted_at = self._composed_at = self._first_token_at = now

    @property
    def remaining(self) -> int:
        """Tokens known but not yet computed: 1 in a decode step, the rest of the prompt before."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether the prompt is computed."""
        return self.generated > 0

    def compose_started(self, now: float) -> None:
        self._admitted_at = now

    def composed(self, state: SequenceState, now: float) -> None:
        self.state = state
        self._composed_at = now

    def accept(self, token: int, end_token_ids: frozenset[int], now: float) -> Event | None:
        """Take the next token; returns what there is to tell, if anything."""
        if not self.decoding:
            self._first_token_at = now
        if token in end_token_ids:
            return self._event(self._stops.flush(), "end", now)
        self.generated += 1
        self._unreported += 1
        self.tokens.append(token)
        text = self._stops.feed(self._detokenizer.feed(token))
        if self._stops.stopped:
            return self._event(text, "stop", now)
        if self.generated == self.request.sampling.max_tokens:
            return self._event(text + self._stops.flush(), "length", now)
        return self._event(text, None, now) if text else None

    def _event(self, text: str, reason: Reason | None, now: float) -> Event:
        finish = None
        if reason is not None:
            stages = StageSeconds(
                queue=self._admitted_at - self._submitted_at,
                compose=self._composed_at - self._admitted_at,
                prefill=self._first_token_at - self._composed_at,
                decode=now - self._first_token_at,
            )
            finish = Finish(reason, self.generated, stages)
        tokens, self._unreported = self._unreported, 0
        return Event(text, tokens, finish)


class TokenStream:
    """What one coroutine reads, by ``push`` as an ``EventSink``.

    Events that a slow reader has not taken are merged into one, so what is kept is bounded by the text itself and a
    reader that comes back late catches up with a single message.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pending: list[Event] = []
        self._waking = False
        self._waiter: asyncio.Future[None] | None = None

    def push(self, event: Event) -> None:
        """Add an event; from any thread. Raises ``RuntimeError`` when the reader's loop is closed."""
        with self._lock:
            self._pending.append(event)
            wake, self._waking = not self._waking, True
        if wake:
            self._loop.call_soon_threadsafe(self._wake)

    async def read(self) -> Event:
        """The next event; raises the sequence's error once the text before it was read."""
        while True:
            with self._lock:
                event = self._take()
            if event is not None:
                if event.error is not None:
                    raise event.error
                return event
            # No event can be missed here: _wake runs in this loop, so not before the next line has run.
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self) -> Event | None:
        taken = [event for event in self._pending if event.error is None]
        self._pending = [event for event in self._pending if event.error is not None]
        if not taken:  # an error stays: every further read raises it again
            return self._pending[0] if self._pending else None
        return Event("".join(event.text for event in taken), sum(event.tokens for event in taken), taken[-1].finish)

    def _wake(self) -> None:
        with self._lock:
            self._waking = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
