"""Following a run's metrics from another process."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from blockrag.training.adaptation.metrics import OnProgress, StepMetrics
from blockrag.training.adaptation.run import METRICS

_POLL_SECONDS = 0.2


class MetricsFollower:
    """Hands each new line of metrics.jsonl to a callback, in order and once, also when the file is cut and regrows.

    Lines that stand there already are passed over: they belong to what was done before.
    """

    def __init__(self, folder: Path, on_progress: OnProgress) -> None:
        self._path = folder / METRICS
        self._on_progress = on_progress
        self._last = max((metrics.step for metrics in self._read()), default=-1)

    def follow(self, finished: threading.Event) -> None:
        """Poll until ``finished``, and once more after it."""
        while not finished.wait(_POLL_SECONDS):
            self.poll()
        self.poll()

    def poll(self) -> None:
        """Hand on what came since the last time."""
        for metrics in self._read():
            if metrics.step > self._last:
                self._last = metrics.step
                self._on_progress(metrics)

    def _read(self) -> list[StepMetrics]:
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                values: dict[str, Any] = json.loads(line)
            except ValueError:  # half a line: the next poll sees it whole
                break
            found.append(StepMetrics(**values))
        return found
