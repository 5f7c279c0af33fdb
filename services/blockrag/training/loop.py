"""The loop that every training runs: draw, step, measure, report, keep a checkpoint; and go on from one.

A run in a budget of steps ends the same whether it was stopped or not, because a step's samples depend on its number
and the seed alone. They are drawn while the step before is computed.
"""

from __future__ import annotations

import ctypes
import math
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import nn, optim

from blockrag.training.run import MetricsLog, OnProgress, RunFolder, RunState, Scores, StepMetrics, read_records
from blockrag.training.workers import Workers

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
Decay = Literal["cosine", "linear"]
_SPEED_STEPS = 20
_LAST = 0.03
"""Of the peak learning rate, at the end of a cosine."""

S = TypeVar("S")


@dataclass(frozen=True)
class StepResult:
    """What a step found, over all workers."""

    losses: Mapping[str, float]
    """Nats per target token, by kind."""
    gradient_norm: float
    """Before it is clipped to 1."""
    tokens: int
    """Trained tokens, or whatever else a run's work is counted in."""
    further: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    """See ``StepMetrics``; all until now."""


class Learner(Protocol[S]):
    """What a run trains."""

    @property
    def model(self) -> nn.Module:
        """What a checkpoint holds."""
        ...

    @property
    def optimizers(self) -> Sequence[optim.Optimizer]: ...

    def draw(self, step: int, fraction: float) -> S:
        """This worker's samples of a step; ``fraction`` (0 to 1) of the budget is used up before it, about."""
        ...

    def step(self, samples: S, factor: float) -> StepResult:
        """One update; ``factor`` is on the peak learning rate."""
        ...

    def measure(self) -> Scores:
        """Held-out scores; empty where nothing is measured."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long a run takes and when it does what besides."""

    steps: int | None
    learning_rate: float
    """Peak."""
    warmup_steps: int
    minutes: float | None = None
    """Time budget of the steps instead; pauses and measurements do not count."""
    eval_steps: int = 200
    checkpoint_steps: int = 100
    decay: Decay = "cosine"

    @classmethod
    def of(cls, config: Any) -> Schedule:
        """The schedule in a configuration, which has fields of these names."""
        names = ("steps", "learning_rate", "warmup_steps", "eval_steps", "checkpoint_steps")
        return cls(**{name: getattr(config, name) for name in names}, minutes=getattr(config, "minutes", None))

    def fraction(self, state: RunState) -> float:
        """Part of the budget that is used up; at 1 and above the run is done."""
        return state.step / (self.steps or 1) if self.minutes is None else state.seconds / (60 * self.minutes)

    def left(self, state: RunState, seconds: float) -> float:
        """Seconds until the end, where a step takes ``seconds``."""
        if self.minutes is not None:
            return max(0.0, 60 * self.minutes - state.seconds)
        return ((self.steps or 0) - state.step) * seconds


def train(
    learner: Learner[S],
    schedule: Schedule,
    folder: RunFolder,
    workers: Workers,
    on_progress: OnProgress | None = None,
    *,
    tensorboard: bool = False,
) -> RunState:
    """Train to the end of the budget, from the folder's last checkpoint on; ``folder`` must be opened.

    Every worker calls it. Start and end are always measured, and ``folder.scores`` has both afterwards.
    """
    return _Run(learner, schedule, folder, workers, on_progress).run(tensorboard)


@dataclass
class _Run(Generic[S]):
    learner: Learner[S]
    schedule: Schedule
    folder: RunFolder
    workers: Workers
    on_progress: OnProgress | None
    log: MetricsLog | None = None
    speeds: list[tuple[int, float]] = field(default_factory=list)
    reported: set[str] = field(default_factory=set)

    def run(self, tensorboard: bool) -> RunState:
        if self.workers.device.type == "cpu":
            never_return_memory()
        state = self.folder.restore(self.learner.model, self.learner.optimizers)
        self.reported = {place for record in read_records(self.folder.path) for place in record.get("left_out", ())}
        if self.workers.rank != 0:
            return self._train(state)
        with closing(MetricsLog(self.folder.path, tensorboard=tensorboard)) as self.log:
            return self._train(state)

    def _train(self, state: RunState) -> RunState:
        learner, schedule = self.learner, self.schedule
        if state.step == 0:
            self._report(StepMetrics(step=0, fraction=0.0, dev=learner.measure()))
        fraction = schedule.fraction(state)
        with ThreadPoolExecutor(1) as drawing:  # the tokenizers library computes without the interpreter's lock
            ahead = drawing.submit(learner.draw, state.step, fraction)
            while fraction < 1:
                samples = ahead.result()
                started = time.perf_counter()
                following = replace(state, step=state.step + 1)
                if schedule.fraction(following) < 1:
                    ahead = drawing.submit(learner.draw, following.step, schedule.fraction(following))
                factor = learning_rate_factor(state.step, fraction, schedule.warmup_steps, decay=schedule.decay)
                result = learner.step(samples, factor)
                # the mean over the workers, so that all end at the same step
                took = float(self.workers.sum(torch.tensor([time.perf_counter() - started]))) / self.workers.size
                state = replace(following, tokens=state.tokens + result.tokens, seconds=state.seconds + took)
                fraction = schedule.fraction(state)
                self.speeds = [*self.speeds, (result.tokens, took)][-_SPEED_STEPS:]
                measured = fraction >= 1 or state.step % schedule.eval_steps == 0
                self._report(self._metrics(state, result, factor, learner.measure() if measured else {}))
                # after the report: what a checkpoint holds is in the metrics, and what came later is cut from them
                if fraction >= 1 or state.step % schedule.checkpoint_steps == 0:
                    self.folder.save(learner.model, learner.optimizers, state)
            ahead.cancel()
        return state

    def _metrics(self, state: RunState, result: StepResult, factor: float, dev: Scores) -> StepMetrics:
        recent = sum(took for _, took in self.speeds)
        fresh = {place: tokens for place, tokens in result.left_out.items() if place not in self.reported}
        self.reported.update(fresh)
        return StepMetrics(
            step=state.step,
            fraction=min(1.0, self.schedule.fraction(state)),
            losses=result.losses,
            further=result.further,
            gradient_norm=result.gradient_norm,
            learning_rate=self.schedule.learning_rate * factor,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=sum(tokens for tokens, _ in self.speeds) / recent,
            eta_seconds=self.schedule.left(state, recent / len(self.speeds)),
            dev=dev,
            left_out=fresh,
        )

    def _report(self, metrics: StepMetrics) -> None:
        if self.log is not None:
            self.log.write(metrics)
            if self.on_progress is not None:
                self.on_progress(metrics)


def learning_rate_factor(step: int, fraction: float, warmup_steps: int, decay: Decay = "cosine") -> float:
    """Factor on the peak learning rate: linear warm-up; over the budget a cosine down to ``_LAST``, or a line to 0."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    if decay == "linear":
        return min(warmup, 1 - fraction)
    return warmup * (_LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))))


def never_return_memory() -> bool:
    """Tell glibc not to hand large blocks back to the system: training on a CPU runs 1.6 times faster for it.

    True where that was possible. By default every large tensor is mapped and unmapped, so each step touches gigabytes
    of fresh pages. The setting
    holds for the whole process and costs its peak memory, so only training processes choose it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 * 2**20))
    return all(bool(mallopt(name, value)) for name, value in settings)
