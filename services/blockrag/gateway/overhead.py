"""What the first token of an answer takes beside retrieval and the decoder's own work."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

_KEPT = 32
_ELSEWHERE = ("retrieve", "compose", "prefill")
"""Stages that a plan under a latency budget knows or predicts itself."""


class Overhead:
    """The median, over the latest answers, of fetching, waiting, the calls between services and planning, without
    the policy's own time.

    A plan for a latency needs it: time that is spent there cannot be spent on slots. Answers with compression count
    where there are any, since only their plans take a call to the compressor. Not for several threads.
    """

    def __init__(self) -> None:
        self._compressed: deque[float] = deque(maxlen=_KEPT)
        self._plain: deque[float] = deque(maxlen=_KEPT)

    def record(
        self,
        time_to_first_token_ms: float,
        stage_ms: Mapping[str, float],
        policy_ms: float = 0.0,
        *,
        compressed: bool = False,
    ) -> None:
        """Count one answer; one without a first token says nothing."""
        if time_to_first_token_ms > 0:
            known = policy_ms + sum(stage_ms.get(stage, 0.0) for stage in _ELSEWHERE)
            latest = self._compressed if compressed else self._plain
            latest.append(max(0.0, time_to_first_token_ms - known))

    @property
    def milliseconds(self) -> float:
        """Typical overhead of an answer with compression; 0 before the first answer."""
        latest = self._compressed or self._plain
        return statistics.median(latest) if latest else 0.0
