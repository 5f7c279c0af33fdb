"""What a stage reports: one record per step in metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockrag.training.adaptation.run import METRICS


@dataclass(frozen=True)
class RefragMetrics:
    """State of a stage after a step; step 0 is before the first."""

    step: int
    fraction: float
    """Part of the budget that is used up, 0 to 1."""
    losses: dict[str, float] = field(default_factory=dict)
    """Nats per target token of this step, by kind: ``text`` and ``answers``."""
    gradient_norm: float = 0.0
    """Before it is clipped to 1."""
    learning_rate: float = 0.0
    """Of chunk encoder and projector."""
    tokens: int = 0
    """Tokens read since the start, those of targets included."""
    seconds: float = 0.0
    """Time spent in steps since the start."""
    tokens_per_second: float = 0.0
    """Of the last steps."""
    eta_seconds: float = 0.0
    """Time left until the budget is used up."""
    dev: dict[str, dict[str, float]] = field(default_factory=dict)
    """Held-out scores by composition, where they were measured."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RefragMetrics:
        """Read a record."""
        return cls(**values)


class MetricsWriter:
    """Appends records, each readable at once."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / METRICS).open("a", encoding="utf-8")

    def write(self, metrics: RefragMetrics) -> None:
        """One line."""
        values = {key: value for key, value in asdict(metrics).items() if value != {}}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
