from __future__ import annotations

import threading
from pathlib import Path

from blockrag.training.run import METRICS, MetricsFollower, MetricsLog, StepMetrics

SCORES = {"block": {"nats": 1.5, "exact": 0.5}, "full": {"nats": 1.25, "exact": 0.75}}


def metrics(step: int, **values: object) -> StepMetrics:
    return StepMetrics(step=step, fraction=step / 10, losses={"block": 2.0}, tokens=10 * step, **values)  # type: ignore[arg-type]


def write(folder: Path, *steps: StepMetrics) -> None:
    log = MetricsLog(folder)
    for step in steps:
        log.write(step)
    log.close()


def test_each_line_is_handed_on_once_and_whole(tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    follower = MetricsFollower(tmp_path, seen.append)
    follower.poll()
    write(tmp_path, metrics(0, dev=SCORES), metrics(1, left_out={"rows:3": 700}))
    with (tmp_path / METRICS).open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "fra')
    follower.poll()
    follower.poll()

    assert seen == [metrics(0, dev=SCORES), metrics(1, left_out={"rows:3": 700})]

    with (tmp_path / METRICS).open("a", encoding="utf-8") as file:
        file.write('ction": 0.2, "losses": {"block": 2.0}, "tokens": 20}\n')
    follower.poll()

    assert seen[2:] == [metrics(2)]


def test_what_stood_there_before_is_passed_over_and_repeated_steps_too(tmp_path: Path) -> None:
    write(tmp_path, metrics(0), metrics(1), metrics(2))
    seen: list[StepMetrics] = []
    follower = MetricsFollower(tmp_path, seen.append)

    (tmp_path / METRICS).unlink()  # a worker that starts again cuts what came after its checkpoint
    write(tmp_path, metrics(0), metrics(1))
    follower.poll()
    write(tmp_path, metrics(2), metrics(3))
    follower.poll()

    assert [step.step for step in seen] == [3]


def test_following_ends_with_what_came_last(tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    finished = threading.Event()
    follower = MetricsFollower(tmp_path, seen.append)
    finished.set()
    write(tmp_path, metrics(0))

    follower.follow(finished)

    assert [step.step for step in seen] == [0]
