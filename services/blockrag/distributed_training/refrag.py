"""``adapt_refrag`` on several workers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from blockrag.distributed_training.launching import launch
from blockrag.training.refrag.adapt import OnProgress, adapt_refrag, prepare
from blockrag.training.refrag.config import RefragConfig
from blockrag.training.refrag.metrics import RefragMetrics


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
