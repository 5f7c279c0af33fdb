"""The loop of every training: budgets, what is reported when, and going on from a checkpoint."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blockrag.training.loop import Schedule, StepResult, learning_rate_factor, train
from blockrag.training.run import RunFolder, RunState, Scores, StepMetrics
from blockrag.training.workers import Workers


class Line:
    """Learns a line's slope; a step's samples depend on its number."""

    def __init__(self, pause: float = 0.0) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizers = [torch.optim.Adam(self.model.parameters(), lr=0.1)]
        self.drawn: list[tuple[int, float]] = []
        self.threads: set[int] = set()
        self._pause = pause

    def draw(self, step: int, fraction: float) -> Tensor:
        self.drawn.append((step, fraction))
        self.threads.add(threading.get_ident())
        return torch.rand(8, 1, generator=torch.Generator().manual_seed(step))

    def step(self, samples: Tensor, factor: float) -> StepResult:
        time.sleep(self._pause)
        (optimizer,) = self.optimizers
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        optimizer.zero_grad()
        loss = (self.model(samples) - 3 * samples).square().mean()
        loss.backward()
        optimizer.step()
        step = len(self.drawn)
        return StepResult({"line": float(loss.detach())}, 1.0, len(samples), left_out={f"row {step > 2}": 9})

    def measure(self) -> Scores:
        return {"slope": {"now": float(self.model.weight.detach())}}


def schedule(**changes: object) -> Schedule:
    values = {"steps": 6, "learning_rate": 0.1, "warmup_steps": 2, "eval_steps": 2, "checkpoint_steps": 2, **changes}
    return Schedule(**values)  # type: ignore[arg-type]


def run(path: Path, learner: Line, wanted: Schedule, stop: int = -1) -> tuple[RunState, list[StepMetrics], Scores]:
    seen: list[StepMetrics] = []

    def show(metrics: StepMetrics) -> None:
        seen.append(metrics)
        if metrics.step == stop:
            raise InterruptedError

    folder = RunFolder(path, Workers())
    with folder.opened({"kind": "line"}):
        state = train(learner, wanted, folder, Workers(), show)
    return state, seen, folder.scores()


def test_a_budget_of_steps(tmp_path: Path) -> None:
    learner = Line()
    state, seen, scores = run(tmp_path, learner, schedule())

    assert [metrics.step for metrics in seen] == list(range(7))
    assert [bool(metrics.dev) for metrics in seen] == [True, False, True, False, True, False, True]
    assert (state.step, state.tokens, seen[-1].fraction, seen[-1].eta_seconds) == (6, 48, 1.0, 0.0)
    assert scores == {"before": seen[0].dev, "after": seen[-1].dev}
    assert seen[-1].dev["slope"]["now"] > 0.2 and seen[-1].tokens_per_second > 0
    assert [metrics.learning_rate for metrics in seen[1:3]] == pytest.approx([0.05, 0.1], rel=0.1)
    # what a step needs is drawn while the one before is computed, by one thread, and nothing for after the end
    assert learner.drawn == [(step, pytest.approx(step / 6)) for step in range(6)]
    assert len(learner.threads) == 1 and threading.get_ident() not in learner.threads
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [StepMetrics(**line) for line in lines] == seen


def test_a_budget_of_minutes_ends_with_the_step_that_uses_it_up(tmp_path: Path) -> None:
    state, seen, _ = run(tmp_path, Line(pause=0.01), schedule(steps=None, minutes=0.1 / 60))
    assert 2 <= state.step <= 10 and state.seconds >= 0.1
    assert [metrics.fraction < 1 for metrics in seen] == [True] * state.step + [False]
    assert seen[1].eta_seconds == pytest.approx(0.1 - seen[1].seconds) and seen[-1].eta_seconds == 0.0
    assert seen[-1].dev


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path: Path, decay: str) -> None:
    whole, stopped, resumed = Line(), Line(), Line()
    run(tmp_path / "whole", whole, schedule(decay=decay))
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", stopped, schedule(decay=decay), stop=5)
    state, seen, scores = run(tmp_path / "cut", resumed, schedule(decay=decay))

    assert ([metrics.step for metrics in seen], state.tokens) == ([5, 6], 48)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert scores["before"] == {"slope": {"now": 0.0}}
    records = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(7))
    # a run that is done computes nothing, and still knows its scores
    again, nothing, same = run(tmp_path / "cut", Line(), schedule(decay=decay))
    assert (again.step, nothing, same) == (6, [], scores)


def test_a_row_is_said_to_be_left_out_once(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        run(tmp_path, Line(), schedule(), stop=5)
    _, later, _ = run(tmp_path, Line(), schedule())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    places = [place for record in records for place in record.get("left_out", ())]
    assert sorted(places) == sorted(set(places)) and "row True" in places
    assert not any(metrics.left_out.keys() & {"row True"} for metrics in later)


def test_the_learning_rate_warms_up_and_falls() -> None:
    assert learning_rate_factor(0, 0.0, 10) == pytest.approx(0.1)
    assert learning_rate_factor(9, 0.0, 10) == pytest.approx(1.0)
    assert learning_rate_factor(500, 1.0, 10) == pytest.approx(0.03)
