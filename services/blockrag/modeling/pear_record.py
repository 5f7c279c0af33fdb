"""What a bundle's manifest says of its heads' coefficients (PEAR, arXiv 2409.19745): ``pear``. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from blockrag.errors import BundleError
from blockrag.modeling.files import check_keys

Mask = Literal["full", "block"]
MASKS: tuple[Mask, ...] = ("full", "block")


@dataclass(frozen=True)
class HeadCoefficient:
    """The coefficient of one head, both counted from 0."""

    layer: int
    head: int
    tau: float
    """Factor on the head's contribution; 1 changes nothing."""
    delta_pi: float
    """Why it was chosen: the relative rise of the copied token's logit when the head's output is its mean."""


@dataclass(frozen=True)
class ProxyScore:
    """Copying random tokens: the second copy's tokens after its first."""

    loss: float
    """Cross-entropy, nats per token."""
    accuracy: float
    """Share of tokens whose logit is the highest."""


@dataclass(frozen=True)
class PearRecord:
    """What a manifest says of a bundle's coefficients: ``pear``."""

    heads: tuple[HeadCoefficient, ...]
    mask: Mask
    """Mask under which heads were detected and coefficients learned."""
    mean: str
    """What replaced a head's output: its mean over the "batch" or over the "sequence"."""
    later_heads: str
    """Whether later layers' heads kept the clean run's outputs ("frozen") or attended anew ("live")."""
    sizes: tuple[tuple[int, int], ...]
    """Samples and tokens per copy of each detection."""
    distractors: int
    """Further passage blocks of a prompt under the block mask."""
    n: int
    """Tokens per copy while learning."""
    steps: int
    batch: int
    learning_rate: float
    seed: int
    """Seed of detection; learning draws with seed + 1, the scores with seed + 2."""
    before: Mapping[str, ProxyScore]
    """Held-out score of the proxy task under each mask with every τ = 1."""
    after: Mapping[str, ProxyScore]
    """The same with the coefficients folded."""

    def to_dict(self) -> dict[str, Any]:
        """For the manifest, as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> PearRecord:
        """Read a manifest's ``pear``. Raises BundleError naming ``where`` and the problem."""
        check_keys(cls, values, f"{where}: pear")
        try:
            heads = tuple(HeadCoefficient(**head) for head in values["heads"])
            scores = {
                key: {mask: ProxyScore(**score) for mask, score in values[key].items()} for key in ("before", "after")
            }
            sizes = tuple((int(samples), int(length)) for samples, length in values["sizes"])
        except (TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{where}: pear: {error}") from error
        if values["mask"] not in MASKS:
            raise BundleError(f"{where}: pear: mask {values['mask']!r}")
        if len({(head.layer, head.head) for head in heads}) != len(heads) or not heads:
            raise BundleError(f"{where}: pear: heads must be named, and each once")
        for head in heads:
            places = (head.layer, head.head)
            if not all(isinstance(place, int) and place >= 0 for place in places) or not _is_finite(head.tau):
                raise BundleError(f"{where}: pear: head {head.layer}.{head.head} with coefficient {head.tau!r}")
        return cls(**{**values, "heads": heads, "sizes": sizes, **scores})


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
