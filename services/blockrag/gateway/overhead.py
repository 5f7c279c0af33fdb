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

    A plan for a latency needs it: time that is spent there cannot be spent on slots. Answers whose plans took a call to
    the compressor count where there are any. Not for several threads.
    """

    def __init__(self) -> None:
        self._by_compressor: deque[float] = deque(maxlen=_KEPT)
        self._near: deque[float] = deque(maxlen=_KEPT)

    def record(
        self,
        time_to_first_token_ms: float,
        stage_ms: Mapping[str, float],
        policy_ms: float = 0.0,
        *,
        by_compressor: bool = False,
    ) -> None:
        """Count one answer, ``by_compressor``: planned by it; one without a first token says nothing."""
        if time_to_first_token_ms > 0:
            known = policy_ms + sum(stage_ms.get(stage, 0.0) for stage in _ELSEWHERE)
            latest = self._by_compressor if by_compressor else self._near
            latest.append(max(0.0, time_to_first_token_ms - known))

    @property
    def milliseconds(self) -> float:
        """Typical overhead of an answer that the compressor plans; 0 before the first answer."""
        latest = self._by_compressor or self._near
        return statistics.median(latest) if latest else 0.0
