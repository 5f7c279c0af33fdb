"""``adapt_block`` on several workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from blockrag.distributed_training.launching import launch
from blockrag.training.adaptation.adapt import adapt_block, prepare
from blockrag.training.adaptation.config import BlockAdaptConfig
from blockrag.training.adaptation.metrics import StepMetrics


def adapt_block_distributed(
    config: BlockAdaptConfig, workers: int, on_progress: Callable[[StepMetrics], None] | None = None
) -> Path:
    """``adapt_block`` on ``workers`` workers of the Ray that this process is connected to; returns the bundle.

    Workers that are lost start again from the last checkpoint. Raises what ``adapt_block`` and ``launch`` raise.
    """
    prepare(config, workers)
    launch(
        partial(adapt_block, config),
        run_dir=config.run_dir,
        device=config.device,
        workers=workers,
        read=StepMetrics.from_dict,
        on_progress=on_progress,
    )
    return config.out
