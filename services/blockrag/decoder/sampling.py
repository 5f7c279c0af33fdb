"""Choosing next tokens: greedy, temperature, nucleus; a random stream of its own for every sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from blockrag.errors import DataError, InvalidRequestError
from blockrag.limits import MAX_TEMPERATURE


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence's tokens are chosen and when they end.

    Raises ``InvalidRequestError`` naming the field of the ``Sampling`` message for a value out of range.
    """

    max_tokens: int
    """Most tokens generated; at least 1."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1: off."""
    seed: int = 0
    """Seed of the sequence's random stream, in [0, 2**64)."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequestError("sampling.max_tokens", f"must be at least 1, is {self.max_tokens}")
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE:  # also refuses NaN
            raise InvalidRequestError("sampling.temperature", f"must be in [0, {MAX_TEMPERATURE:g}]")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError("sampling.top_p", "must be in (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise InvalidRequestError("sampling.seed", "must be in [0, 2**64)")
        if any(not text for text in self.stop):
            raise InvalidRequestError("sampling.stop", "holds an empty string")


class Sampler:
    """Chooses the tokens of one sequence.

    The random stream belongs to the sequence and lives on the CPU: the same seed draws the same numbers on any
    device and whatever else is in the batch.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.greedy = params.temperature == 0.0
        self._temperature = params.temperature
        self._top_p = params.top_p
        self._generator = None if self.greedy else torch.Generator().manual_seed(params.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """A token id from one row of logits, shape [vocab], by inversion of the cumulative distribution."""
        number = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
        if self._top_p < 1.0:
            ordered, ids = probabilities.sort(descending=True, stable=True)
            cumulative = ordered.cumsum(dim=-1)
            # The nucleus is the smallest set whose mass reaches top_p; the likeliest token is always in it.
            kept = int((cumulative < self._top_p).sum().item()) + 1
            cumulative = cumulative[:kept]
            return int(ids[_invert(cumulative, number)].item())
        return _invert(probabilities.cumsum(dim=-1), number)


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | DataError]:
    """One token id per row; a row without a finite maximum gives an error instead, and harms no other row.

    Args:
        logits: shape [rows, vocab], float32, on any device.
        samplers: one per row.
    """
    highest, greedy_ids = logits.max(dim=-1)  # a NaN anywhere in a row is its maximum
    tokens: list[int | DataError] = []
    for row, (value, token) in enumerate(zip(highest.tolist(), greedy_ids.tolist(), strict=True)):
        if not math.isfinite(value):
            tokens.append(DataError("the model's logits are not finite"))
        elif samplers[row].greedy:
            tokens.append(token)
        else:
            tokens.append(samplers[row].draw(logits[row]))
    return tokens


def _invert(cumulative: torch.Tensor, number: float) -> int:
    target = cumulative[-1:] * number
    index = int(torch.searchsorted(cumulative, target, right=True).item())
    return min(index, cumulative.shape[0] - 1)
