"""The engine: continuous batching in a thread of its own. ``step() = schedule → forward → sample → emit``.

It imports no Ray, pydantic or gRPC, and runs alone where there is a model. Requests come in through ``submit`` and
``cancel`` from any thread; events go out through each request's sink. Whatever happens to one sequence, the others
go on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blockrag.decoder.detokenizer import Detokenizer
from blockrag.decoder.scheduler import EngineLimits, Scheduler, Work
from blockrag.decoder.sequence import Event, EventSink, GenerationRequest, Sequence, sample
from blockrag.errors import (
    BlockragError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    UnavailableError,
)

if TYPE_CHECKING:
    from blockrag.modeling.model import SlotModel

_logger = logging.getLogger(__name__)

_SHORTEST_RETRY_MS = 50
_HUNG_STOP_S = 1.0
"""How long ``stop`` waits for a thread that was given up."""
_HANDOFF_S = 2e-5
"""Pause after a step with a first token. It gives the interpreter lock to the thread that delivers the token, which
would else wait until this thread has been through a good part of the next step (measured: 1.1 to 0.3 ms, median)."""
_WORTH_THREADS = 50_000_000
"""Multiplications of a step that are worth more than one thread. In a service threads sleep while they wait, and waking
one for each of a hundred small products takes longer than it helps: of a model of 6.5 million parameters a token is
faster on one core, of the bundled reader (135 million) on two, 60 to 46 ms."""
_AVERAGING = 0.2
"""Weight of the newest sequence in the running mean behind retry hints."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing."""

    running: int
    waiting: int
    used_slots: int
    total_slots: int
    generated_tokens: int
    """Since the start."""


class Engine:
    """Generates for many sequences at once."""

    def __init__(
        self,
        model: SlotModel,
        limits: EngineLimits,
        new_detokenizer: Callable[[], Detokenizer],
        *,
        threads: int | None = None,
    ) -> None:
        """``threads``: most CPU threads of a forward pass; None leaves torch's own choice."""
        self._model = model
        self._threads = threads
        self._limits = limits
        self._new_detokenizer = new_detokenizer
        self._scheduler = Scheduler(limits)
        self._changed = threading.Condition()  # guards the scheduler; notified when there may be work
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        """What ended the engine's thread, if anything did: the process must be replaced then."""
        self._generated = 0
        self._answering = 0  # sequences that had their first token, since the start
        self._mean_seconds = 0.0
        self._step_started: float | None = None  # None: waits for work

    def start(self) -> None:
        """Start the engine's thread."""
        if self._thread is not None:
            raise RuntimeError("the engine was started already")
        self._thread = threading.Thread(target=self._run, name="decoder-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; sequences that are left get ``UnavailableError``."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(None if self.failure is None else _HUNG_STOP_S)
        else:
            self._abandon()

    @property
    def step_seconds(self) -> float:
        """How long the step under way has taken so far; 0 when there is none."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def give_up(self, problem: str) -> None:
        """Declares the thread lost, from another one: every sequence gets ``UnavailableError``, and ``failure`` is set.

        For a step that does not return. Nothing is freed: the process must be replaced.
        """
        with self._changed:
            self._stopping = True
            self.failure = RuntimeError(problem)
            sequences = self._scheduler.sequences()
        for sequence in sequences:
            self._push(sequence, Event(error=UnavailableError("the decoder hangs; send the request again")))

    def check(self, prompt_slots: int, max_tokens: int, tenant: str = "") -> None:
        """Refuse early what ``submit`` would refuse now, before its blocks are fetched.

        Raises ``PromptTooLongError``, ``InvalidRequestError`` (``sampling.max_tokens``), ``OverloadedError`` or
        ``UnavailableError``.
        """
        positions = self._model.max_positions
        if prompt_slots >= positions:
            raise PromptTooLongError(
                f"the prompt has {prompt_slots} tokens; the model takes {positions} with the answer"
            )
        if prompt_slots + max_tokens > positions:
            raise InvalidRequestError(
                "sampling.max_tokens",
                f"{max_tokens} with a prompt of {prompt_slots} tokens is beyond the model's {positions} positions",
            )
        if prompt_slots + max_tokens > self._limits.slots:
            raise InvalidRequestError(
                "sampling.max_tokens",
                f"{max_tokens} with a prompt of {prompt_slots} tokens exceeds the {self._limits.slots} slots there are",
            )
        with self._changed:
            self._check_open()
            self._scheduler.check(tenant, self._retry_after_ms())

    def submit(self, request: GenerationRequest, sink: EventSink) -> Sequence:
        """Take a request in; its events go to ``sink``, the last one has a finish or an error.

        Raises what ``check`` raises, and ``InvalidRequestError`` for a prompt without tokens to prefill.
        """
        if not request.token_ids:
            raise InvalidRequestError("final_token_ids", "must hold at least one token")
        self.check(request.prompt_slots, request.sampling.max_tokens, request.tenant)
        sequence = Sequence(request, self._new_detokenizer(), sink, time.monotonic())
        with self._changed:
            self._check_open()
            self._scheduler.submit(sequence, self._retry_after_ms())
            self._changed.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop a sequence before the next step; it gets no further event. Nothing happens to a finished one."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify()

    def stats(self) -> EngineStats:
        """What the engine is doing."""
        with self._changed:
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                used_slots=self._scheduler.used_slots,
                total_slots=self._limits.slots,
                generated_tokens=self._generated,
            )

    @torch.inference_mode()
    def step(self) -> bool:
        """One round for all sequences; False when there was nothing to compute.

        Called by the engine's thread; call it directly only where the engine was not started.
        """
        self._drop_dead()
        self._compose_admitted()
        with self._changed:
            work = self._scheduler.plan()
        if not work:
            return False
        complete, logits = self._forward(work)
        if complete:
            self._accept(complete, sample(logits, [sequence.sampler for sequence in complete]))
        return True

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                answering = self._answering
                self._step_started = time.monotonic()
                self.step()
                self._step_started = None
                if self._answering > answering:
                    time.sleep(_HANDOFF_S)
        except BaseException as error:
            _logger.exception("the decoder's engine failed")
            self.failure = error
        self._abandon()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._stopping or self._scheduler.running):
                # What waits could run when nothing does, so there is nothing to wake up for but a call.
                self._changed.wait()
            return not self._stopping

    def _drop_dead(self) -> None:
        """End sequences that were cancelled or whose deadline passed."""
        now = time.monotonic()
        with self._changed:
            sequences = self._scheduler.sequences()
        for sequence in sequences:
            deadline = sequence.request.deadline
            if sequence.cancelled:
                self._end(sequence, None)
            elif deadline is not None and now >= deadline:
                self._end(sequence, Event(error=DeadlineError("the deadline passed while the answer was generated")))

    def _compose_admitted(self) -> None:
        with self._changed:
            admitted = [sequence for sequence in self._scheduler.running if sequence.state is None]
        for sequence in admitted:
            sequence.compose_started(time.monotonic())
            request = sequence.request
            capacity = len(request.token_ids) + request.sampling.max_tokens
            try:
                state = self._model.new_sequence(request.blocks, capacity)
            except Exception as error:
                self._fail(sequence, error)
            else:
                sequence.composed(state, time.monotonic())

    def _forward(self, work: SequenceOf[Work]) -> tuple[list[Sequence], torch.Tensor]:
        """Compute a step; returns the sequences whose next token can be drawn and their logits."""
        if self._threads is not None:
            cost = self._model.multiply_adds([(item.state, len(item.token_ids)) for item in work])
            torch.set_num_threads(self._threads if cost >= _WORTH_THREADS else 1)  # holds for the calling thread
        try:
            logits = self._model.forward([(item.state, item.token_ids) for item in work])
            if self._model.unused_token_ids.numel():
                logits = logits.index_fill(1, self._model.unused_token_ids, -math.inf)
        except Exception as error:
            if len(work) == 1:
                self._fail(work[0].sequence, error)
                return [], torch.empty(0)
            _logger.warning("a step of %d sequences failed, computing each alone: %s", len(work), error)
            return self._forward_each(work)
        rows = []
        for row, item in enumerate(work):
            item.sequence.computed += len(item.token_ids)
            if item.sequence.remaining == 0:
                rows.append(row)
        complete = [work[row].sequence for row in rows]
        return complete, logits if len(rows) == len(work) else logits[rows]

    def _forward_each(self, work: SequenceOf[Work]) -> tuple[list[Sequence], torch.Tensor]:
        # A failed forward has counted no slot, so those that did not cause the failure lose nothing.
        parts = [self._forward([item]) for item in work]
        complete = [sequence for sequences, _ in parts for sequence in sequences]
        rows = [logits for sequences, logits in parts if sequences]
        return complete, torch.cat(rows) if rows else torch.empty(0)

    def _accept(self, sequences: SequenceOf[Sequence], tokens: SequenceOf[int | BlockragError]) -> None:
        now = time.monotonic()
        for sequence, token in zip(sequences, tokens, strict=True):
            if not isinstance(token, int):
                self._fail(sequence, token)
                continue
            try:
                event = sequence.accept(token, self._model.end_token_ids, now)
            except Exception as error:
                self._fail(sequence, error)
                continue
            self._generated += token not in self._model.end_token_ids
            self._answering += sequence.generated == 1
            if event is None:
                continue
            if event.finish is not None:
                stages = event.finish.stages
                seconds = stages.compose + stages.prefill + stages.decode
                self._mean_seconds += _AVERAGING * (seconds - self._mean_seconds)
                self._end(sequence, event)
            else:
                self._push(sequence, event)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._end(sequence, Event(error=_translated(error, sequence.request.request_id)))

    def _end(self, sequence: Sequence, event: Event | None) -> None:
        """Free what a sequence holds, then tell its last event."""
        with self._changed:
            self._scheduler.remove(sequence)
        if sequence.state is not None:
            sequence.state.release()
        try:
            sequence.request.released()
        except Exception:
            _logger.exception("releasing the blocks of request %s failed", sequence.request.request_id)
        if event is not None:
            self._push(sequence, event)

    def _push(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.sink(event)
        except Exception as error:  # its event loop is closed: nobody reads any more
            _logger.info("request %s has no reader: %s", sequence.request.request_id, error)
            sequence.cancelled = True

    def _abandon(self) -> None:
        with self._changed:
            self._stopping = True
            sequences = self._scheduler.sequences()
        for sequence in reversed(sequences):  # the waiting first, so that none is admitted on the way out
            self._end(sequence, Event(error=UnavailableError("the decoder is shutting down; send the request again")))

    def _check_open(self) -> None:
        if self._stopping:
            raise UnavailableError("the decoder is shutting down; send the request again")

    def _retry_after_ms(self) -> int:
        """When a place should be free: a mean answer's time for each full round of those that wait."""
        rounds = 1 + len(self._scheduler.waiting) // self._limits.max_sequences
        return max(_SHORTEST_RETRY_MS, round(1000 * self._mean_seconds * rounds))


def _translated(error: Exception, request_id: str) -> BlockragError:
    if isinstance(error, BlockragError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return OverloadedError("the decoder's device is out of memory", 1000)
    _logger.error("request %s failed", request_id, exc_info=error)
    return BlockragError(f"the decoder failed on this request ({type(error).__name__})")
