"""What a run reports: one record per step, to a JSONL file and, if asked, to TensorBoard."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockrag.errors import SetupError
from blockrag.training.adaptation.run import METRICS


@dataclass(frozen=True)
class DevScores:
    """Scores on the samples that a run measures on; of a mask that it trains or not."""

    block_loss: float
    """Nats per answer token under the block mask."""
    full_loss: float
    block_exact: float
    """Share of answers that greedy decoding would give exactly, under the block mask."""
    full_exact: float


@dataclass(frozen=True)
class StepMetrics:
    """State of a run after a step; step 0 is before the first."""

    step: int
    steps: int
    block_loss: float | None = None
    """Nats per answer token of this step's samples under the block mask; None where it was not trained."""
    full_loss: float | None = None
    distillation: float | None = None
    """Weighted divergence per answer token."""
    gradient_norm: float = 0.0
    """Before it is clipped to 1."""
    learning_rate: float = 0.0
    tokens: int = 0
    """Trained tokens since the start, counted once per mask, without padding."""
    seconds: float = 0.0
    """Time spent in steps since the start."""
    tokens_per_second: float = 0.0
    """Of the last steps."""
    eta_seconds: float = 0.0
    """Time left at that speed."""
    dev: DevScores | None = None
    """Where it was measured."""
    too_long: dict[str, int] = field(default_factory=dict)
    """Rows first left out in this step on worker 0: file and line, with the tokens that they need at least."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepMetrics:
        """Read a record."""
        dev = values.get("dev")
        return cls(**{**values, "dev": DevScores(**dev) if dev else None})


class MetricsLog:
    """Appends records to metrics.jsonl, and to TensorBoard's files."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        """Raises SetupError naming the package that TensorBoard lacks."""
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = open_tensorboard(folder / "tensorboard") if tensorboard else None

    def write(self, metrics: StepMetrics) -> None:
        """One line, readable at once."""
        values = {key: value for key, value in asdict(metrics).items() if value not in (None, {})}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in _flat(values).items():
                if isinstance(value, int | float) and key not in ("step", "steps"):
                    self._board.add_scalar(key, value, metrics.step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def open_tensorboard(folder: Path, package: str = "torch.utils.tensorboard") -> Any:
    """A SummaryWriter. Raises SetupError where the package is absent."""
    try:
        return importlib.import_module(package).SummaryWriter(str(folder))
    except ImportError as error:
        raise SetupError(f"TensorBoard was asked for: install the package tensorboard ({error})") from error


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    dev = {f"dev/{key}": value for key, value in values.get("dev", {}).items()}
    return {**values, **dev}
