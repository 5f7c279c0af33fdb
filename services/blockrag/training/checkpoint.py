"""A training run's checkpoint: one file, replaced as a whole."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Checkpoint:
    """How far a run has come. The data position is the step: a step's contexts depend on it and the seed alone."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: Checkpoint) -> None:
    """Write the checkpoint; a kill at any moment leaves either the previous one or this one."""
    staged = folder / f".{CHECKPOINT}"
    with staged.open("wb") as target:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "state": asdict(state),
            },
            target,
        )
        target.flush()
        os.fsync(target.fileno())
    staged.replace(folder / CHECKPOINT)


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Checkpoint | None:
    """Restore model and optimisers in place; ``None`` where the folder holds no checkpoint."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(stored["model"])
    for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Checkpoint(**stored["state"])
