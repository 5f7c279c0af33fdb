"""What the configurations of all trainings share. Without torch: the command line is made of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from blockrag.errors import SetupError
from blockrag.modeling.native.build import BFLOAT16, has_instructions

Precision = Literal["auto", "bf16", "fp32"]


def in_bfloat16(precision: Precision, device_type: str) -> bool:
    """Whether a forward pass is computed in bfloat16 (autocast); ``auto``: where products of it are fast.

    On a processor without its instructions they take hundreds of times as long as those of float32.
    """
    return precision == "bf16" or (precision == "auto" and (device_type == "cuda" or has_instructions(BFLOAT16)))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Of every training."""

    out: Path
    """The bundle to make. The run itself lives beside it, in OUT.run."""
    seed: int = 0
    """Of samples and new weights."""
    device: str = "cpu"
    """cpu or cuda."""

    undecided: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not decide the result, or do so through files, whose digests a run remembers."""

    @property
    def run_dir(self) -> Path:
        """Checkpoints, metrics.jsonl and run.json; several workers need to share it."""
        return self.out.parent / f"{self.out.name}.run"

    def recipe(self) -> dict[str, Any]:
        """The values that decide the result, beside model and data: a run continues only under the same ones."""
        names = [field.name for field in fields(self) if field.name not in self.undecided]
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


@dataclass(frozen=True, kw_only=True)
class StagedConfig(RunConfig):
    """Of a training that goes on from a bundle: how long it takes, and the texts that it reads."""

    text: tuple[Path, ...] = ()
    """JSONL(.gz) files of long texts, ``{title, text}`` or ``{title, paragraphs}``, or directories of such."""
    minutes: float | None = None
    """Time budget of the steps. Pauses and measurements do not count."""
    steps: int | None = None
    """Budget in steps, for runs that must be reproducible. Exactly one of ``minutes`` and ``steps`` is given."""

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise SetupError("give exactly one of minutes and steps")
        self.require_positive("minutes", "steps")
