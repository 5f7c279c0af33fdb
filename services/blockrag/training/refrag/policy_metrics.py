"""What a policy's training reports: one record per step in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blockrag.training.refrag.policy import ImitationStats, UpdateStats
from blockrag.training.refrag.policy_probes import PolicyScores


@dataclass(frozen=True)
class PolicyMetrics:
    """State of a run after a step; step 0 is before the first."""

    step: int
    fraction: float
    """Part of the budget that is used up, 0 to 1."""
    update: UpdateStats | None = None
    imitation: ImitationStats | None = None
    """One of the two; None at step 0."""
    learning_rate: float = 0.0
    draws: int = 0
    """Compositions read since the start."""
    seconds: float = 0.0
    """Time spent in steps since the start."""
    dev: PolicyScores | None = None
    """Held-out scores, where they were measured."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicyMetrics:
        """Read what ``to_dict`` made."""
        read: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "update": lambda found: UpdateStats(**found),
            "imitation": lambda found: ImitationStats(**found),
            "dev": PolicyScores.from_dict,
        }
        return cls(**{key: read[key](value) if key in read else value for key, value in values.items()})
