"""What decides a run of ``blockrag adapt pear``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from blockrag.errors import InvalidRequestError
from blockrag.modeling.pear_record import Mask

Mean = Literal["batch", "sequence"]
LaterHeads = Literal["frozen", "live"]

PUBLISHED_SIZES = ((20, 50), (40, 25), (80, 15), (100, 10))
"""(samples, n) that detection averages over."""
PUBLISHED_SHARE = 30 / 1024
"""Heads re-weighted of Llama-2-7B's."""
LEAST_HEADS = 4
"""Heads re-weighted of a model so small that the published share would be fewer."""
CONDITIONS: Mapping[str, tuple[Mask, bool]] = {
    "full": ("full", False),
    "block": ("block", True),
    "full, same prompts": ("full", True),
}
"""Mask, and whether the prompts have further blocks: as published, as served, and the control between them."""


@dataclass(frozen=True)
class LearningConfig:
    """How coefficients are learned. Prompt size, rate and batch are the published ones."""

    n: int = 50
    """Tokens per copy while learning."""
    steps: int = 200
    """A few dozen to a few hundred; a coefficient moves by at most about steps * learning_rate / 2."""
    batch: int = 20
    """Prompts of a step."""
    learning_rate: float = 5e-3
    """Adam's, falling to 0."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.learning_rate <= 0:
            raise InvalidRequestError("learning", "steps, batch and learning rate must be positive")


@dataclass(frozen=True)
class PearConfig:
    """What to do. The defaults are the published ones, under the mask that is served."""

    heads: int | None = None
    """Most heads to re-weight, of those with a positive Δπ; None: 30 of 1,024, at least 4. To choose: sweep 5 to 40 of
    1,024 and compare answers; the proxy loss falls with every head more."""
    mask: Mask = "block"
    """Mask under which heads are chosen and coefficients learned."""
    mean: Mean = "batch"
    """What replaces a head's output: its mean over the batch or over the sequence."""
    later_heads: LaterHeads = "frozen"
    """Whether later layers' heads keep the clean run's outputs, as published, or attend anew."""
    sizes: tuple[tuple[int, int], ...] = PUBLISHED_SIZES
    """Prompts and tokens per copy that detection averages over."""
    distractors: int = 3
    """Further passage blocks of a prompt under the block mask."""
    learning: LearningConfig = field(default_factory=LearningConfig)
    seed: int = 0
    """Of all prompts."""
    memory: float = 1.0
    """GiB that a batch of detection may take, about; more is faster up to what fills the device."""

    def under(self, condition: str) -> PearConfig:
        """The same for heads that are detected under a condition of ``CONDITIONS``."""
        mask, with_passages = CONDITIONS[condition]
        return replace(self, mask=mask, distractors=self.distractors if with_passages else 0)
