"""What a run is asked to do. Without torch: the command line is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blockrag.errors import SetupError
from blockrag.settings import Settings

Mode = Literal["full", "block", "no-reencoding", "none"]
MODES: tuple[Mode, ...] = ("full", "block", "no-reencoding", "none")
Distractors = Literal["same", "bm25", "dense", "random"]
MOST_PASSAGES = 100


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """Of every run. Raises ``SetupError`` for numbers that cannot be."""

    settings: Settings = field(default_factory=Settings)
    """Of the system that is measured: its bundle, types and limits."""
    data: Path | None = None
    """Questions (JSONL, may be gzipped), or a directory with dev/ and train/."""
    questions: int = 1000
    """How many questions to draw."""
    passages: int = 10
    """Passages per question."""
    distractors: Literal["auto", "same", "bm25", "dense", "random"] = "auto"
    """Passages beside the right one; auto: of the same kind where the data knows, else bm25."""
    seed: int = 0
    """Seed of the draw and of the intervals."""
    max_answer_tokens: int = 64
    """Longest answer."""
    device: str = "cpu"
    """cpu or cuda."""

    def __post_init__(self) -> None:
        self._check("questions", 1)
        self._check("passages", 1, MOST_PASSAGES)
        self._check("max_answer_tokens", 1, 1024)

    def _check(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        if value < least or (most is not None and value > most):
            option = name.replace("_", "-")
            raise SetupError(f"--{option} {value}: must be at least {least}" + (f", at most {most}" if most else ""))


@dataclass(frozen=True, kw_only=True)
class QaOptions(ExperimentOptions):
    """Of ``blockrag eval qa``."""

    compare: Path | None = None
    """A second bundle, asked the same questions with the same passages' texts."""
    without_pear: bool = False
    """Ask also with the bundle's PEAR coefficients left out."""
    modes: tuple[Mode, ...] = ("full", "block")
    counts: tuple[int, ...] = ()
    """Further numbers of passages."""
    places: int = 0
    """Places of the right passage to compare, evenly spread over the passages; 0: none."""
    absent: bool = True
    """Ask also with the right passage left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("places", 0, MOST_PASSAGES)
        for count in self.counts:
            if not 1 <= count <= MOST_PASSAGES:
                raise SetupError(f"--counts {count}: each number must be 1 to {MOST_PASSAGES}")


@dataclass(frozen=True, kw_only=True)
class CompressionOptions(ExperimentOptions):
    """Of ``blockrag eval compression``; paragraphs are predicted in float32."""

    text: Path | None = None
    """Long texts (JSONL, may be gzipped) whose paragraphs are predicted."""
    pairs: bool = False
    """Ask two pattern questions of one relation and one table as one, whose answers stand in two passages."""
    questions: int = 300
    """How many questions to draw."""
    paragraphs: int = 200
    """How many paragraphs to predict."""
    context: int = 10
    """Passages before each of these."""
    rates: tuple[float, ...] = ()
    """Tokens per slot; empty: 1, and every quarter of the bundle's k up to k."""
    selectors: tuple[str, ...] = ()
    """Who chooses what is expanded; empty: all."""
    reencode: float | None = None
    """Rate at which composed is compared with re-encoded; None: half of k, 0: not at all."""
    max_answer_tokens: int = 32
    """Longest answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("paragraphs", 1)
        self._check("context", 1, MOST_PASSAGES)
        if self.pairs:
            self._check("passages", 2)
