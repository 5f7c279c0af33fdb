"""What the configurations of all trainings share."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from blockrag.errors import SetupError


class RunConfig:
    """Base of a dataclass with a field ``out``, the bundle to make."""

    out: Path
    undecided: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not decide the result, or do so through files, whose digests a run remembers."""

    @property
    def run_dir(self) -> Path:
        """Checkpoints, metrics.jsonl and run.json; several workers need to share it."""
        return self.out.parent / f"{self.out.name}.run"

    def recipe(self) -> dict[str, Any]:
        """The values that decide the result, beside model and data: a run continues only under the same ones."""
        names = [field.name for field in fields(self) if field.name not in self.undecided]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names}

    def require(self, condition: bool, name: str, problem: str) -> None:
        """Raises ``SetupError`` naming the field and its value unless ``condition`` holds."""
        if not condition:
            raise SetupError(f"{name} {getattr(self, name)!r}: {problem}")

    def require_least(self, least: int, *names: str) -> None:
        """The same for fields that are numbers, or None."""
        problem = "must not be negative" if least == 0 else f"must be at least {least}"
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value >= least, name, problem)

    def require_positive(self, *names: str) -> None:
        """The same for fields above 0, or None."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "must be positive")

    def require_share(self, *names: str) -> None:
        """The same for fields from 0 to 1, or None."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or 0 <= value <= 1, name, "must be from 0 to 1")
