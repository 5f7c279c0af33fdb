"""``adapt_refrag`` and ``train_policy`` on several workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from blockrag.distributed_training.launching import launch
from blockrag.training.adaptation.workers import ShardedWorkers
from blockrag.training.refrag.adapt import OnProgress, adapt_refrag, prepare
from blockrag.training.refrag.config import RefragConfig
from blockrag.training.refrag.metrics import RefragMetrics
from blockrag.training.refrag.policy_config import PolicyTrainingConfig
from blockrag.training.refrag.policy_metrics import PolicyMetrics
from blockrag.training.refrag.policy_stage import prepare_policy, train_policy

OnPolicyProgress = Callable[[PolicyMetrics], None]


def adapt_refrag_distributed(config: RefragConfig, workers: int, on_progress: OnProgress | None = None) -> Path:
    """``adapt_refrag`` on ``workers`` workers of the Ray that this process is connected to; returns the bundle.

    Workers that are lost start again from the last checkpoint. Raises what ``adapt_refrag`` and ``launch`` raise.
    """
    prepare(config, workers)
    launch(
        partial(adapt_refrag, config),
        run_dir=config.run_dir,
        device=config.device,
        workers=workers,
        read=RefragMetrics.from_dict,
        on_progress=on_progress,
    )
    return config.out


def train_policy_distributed(
    config: PolicyTrainingConfig, workers: int, on_progress: OnPolicyProgress | None = None
) -> Path:
    """The same for a policy: ``train_policy`` on ``workers`` workers."""
    prepare_policy(config)
    launch(
        partial(_train_policy, config),
        run_dir=config.run_dir,
        device=config.device,
        workers=workers,
        read=PolicyMetrics.from_dict,
        on_progress=on_progress,
    )
    return config.out


def _train_policy(config: PolicyTrainingConfig, workers: ShardedWorkers) -> Path:
    return train_policy(config, workers=workers)
