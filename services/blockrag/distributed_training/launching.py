"""Ray Train starts a run's workers, joins them and starts them again after a failure.

The only module that imports ``ray.train``. Workers share the run's folder, so on several machines it must lie on
storage that all of them mount.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from blockrag.errors import BlockragError, EnvironmentSetupError
from blockrag.training.run import MetricsFollower, OnProgress
from blockrag.training.workers import ShardedWorkers

_RESTARTS = 3
_WORK = "work"


def launch(
    work: Callable[[ShardedWorkers], Any],
    *,
    run_dir: Path,
    device: str,
    workers: int,
    on_progress: OnProgress | None,
) -> None:
    """Call ``work`` on ``workers`` workers of the Ray that this process is connected to, and wait for its end.

    A worker takes one GPU where ``device`` is "cuda", else one CPU. When one is lost, all start again from the last
    checkpoint, up to three times. What worker 0 writes to metrics.jsonl in ``run_dir`` goes to ``on_progress``, in a
    thread of this process. Raises the error of ours that ``work`` raised, EnvironmentSetupError when the workers fail
    for another reason.
    """
    on_gpus = device.startswith("cuda")
    storage = run_dir / "ray"
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={_WORK: work},
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpus),
        run_config=RunConfig(
            name="workers", storage_path=str(storage), failure_config=FailureConfig(max_failures=_RESTARTS)
        ),
    )
    try:
        with _followed(run_dir, on_progress):
            trainer.fit()
    except TrainingFailedError as error:
        raise _translated(error) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _work(values: dict[str, Any]) -> None:
    """What each worker runs; Ray Train has joined them to torch's default process group."""
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    values[_WORK](ShardedWorkers(device))


@contextmanager
def _followed(run_dir: Path, on_progress: OnProgress | None) -> Iterator[None]:
    if on_progress is None:
        yield
        return
    follower = MetricsFollower(run_dir, on_progress)
    finished = threading.Event()
    thread = threading.Thread(target=follower.follow, args=(finished,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _translated(error: TrainingFailedError) -> BlockragError:
    """The error of ours that a worker raised, or what Ray says happened."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, BlockragError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return EnvironmentSetupError(f"the workers failed: {error}")
