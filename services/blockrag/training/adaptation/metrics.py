"""What a run reports: one record per step, to a JSONL file and, if asked, to TensorBoard."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockrag.errors import SetupError
from blockrag.training.adaptation.run import METRICS

Scores = Mapping[str, Mapping[str, float]]
"""Held-out scores by what they were measured on, such as a mask or a composition."""


@dataclass(frozen=True)
class StepMetrics:
    """State of a run after a step; step 0 is before the first."""

    step: int
    fraction: float
    """Part of the budget that is used up, 0 to 1."""
    stage: str = ""
    """Of a run of several stages."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Nats per target token of this step's samples, by kind."""
    further: Mapping[str, float] = field(default_factory=dict)
    """What else a step measured, such as a policy's reward."""
    gradient_norm: float = 0.0
    """Before it is clipped to 1."""
    learning_rate: float = 0.0
    tokens: int = 0
    """Trained tokens since the start; of a policy, compositions read."""
    seconds: float = 0.0
    """Time spent in steps since the start."""
    tokens_per_second: float = 0.0
    """Of the last steps."""
    eta_seconds: float = 0.0
    """Time left at that speed."""
    dev: Scores = field(default_factory=dict)
    """Where they were measured."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows first left out in this step on worker 0: file and line, with the tokens that they need at least."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in ("", {})}


OnProgress = Callable[[StepMetrics], None]


class MetricsLog:
    """Appends records to metrics.jsonl, and to TensorBoard's files."""

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        """Raises SetupError naming the package that TensorBoard lacks."""
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = open_tensorboard(folder / "tensorboard") if tensorboard else None

    def write(self, metrics: StepMetrics) -> None:
        """One line, readable at once."""
        values = metrics.to_dict()
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in _flat(values).items():
                if key not in ("step", "fraction"):
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by the path to them: "losses/block", "dev/full/nats"."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found
