"""Comparing two computations layer by layer, and naming the first layer where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_DEEPEST = 10**6
"""Depth of what no layer is to blame for."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    max_difference: float
    """Largest absolute difference of the result (logits), or of the hidden states that differ first."""
    tolerance: float
    """Largest difference allowed here: a fraction of the reference's largest value."""
    passed: bool
    first_difference: str
    """Where it first differs, like "layer 3 (encode)", "logits" or "first tokens"; empty when it passed."""
    agreement: float | None = None
    """Share of positions at which the likeliest token is the reference's; None where no tokens are predicted."""
    divergence: float | None = None
    """KL divergence of the predictions from the reference's, mean over positions, in nats."""


@dataclass(frozen=True)
class Limits:
    """What a comparison allows: a few times what the rounding of a type was measured to explain."""

    relative: float
    """Largest difference of the result, as a fraction of the largest reference value."""
    layers: float
    """The same of hidden states, which a norm follows."""
    agreement: float
    """Least share of positions with the same likeliest token."""
    divergence: float
    """Largest KL divergence, mean over positions, in nats."""


EXACT = Limits(relative=0.0, layers=0.0, agreement=1.0, divergence=0.0)
"""To the bit."""


class Difference:
    """Keeps the difference of the result, and of the first layer that differs too much."""

    def __init__(self, limits: Limits, result: str = "logits") -> None:
        """``result`` names what is compared last."""
        self._limits = limits
        self._result = result
        self._first: tuple[int, str, float, float] | None = None
        self._found = (0.0, 0.0)
        self._predictions: tuple[float, float] | None = None

    def compare(self, where: str, depth: int, got: Tensor, expected: Tensor) -> None:
        """Compare what was computed ``where`` (a layer, or the result), ``depth`` layers deep."""
        maximum = float((got.float() - expected.float()).abs().max())
        relative = self._limits.relative if where == self._result else self._limits.layers
        tolerance = relative * max(1e-6, float(expected.float().abs().max()))
        if where == self._result and maximum >= self._found[0]:
            self._found = (maximum, tolerance)
        # NaN compares as false, so the test is for what is allowed
        if not maximum <= tolerance and (self._first is None or depth < self._first[0]):
            self._first = (depth, where, maximum, tolerance)

    def compare_layers(
        self, got: Sequence[Tensor], expected: Sequence[Tensor], last: int, span: slice | None = None, suffix: str = ""
    ) -> None:
        """Compare hidden states [tokens, width] after each layer of ``got`` with rows ``span`` of ``expected``.

        ``last`` is the number of the model's last layer, of which only the last token is computed.
        """
        for number, states in enumerate(got):
            wanted = expected[number] if span is None else expected[number][span]
            if number == last:
                states, wanted = states[-1:], wanted[-1:]
            self.compare(f"layer {number}{suffix}", number, states, wanted)

    def compare_predictions(self, got: Tensor, expected: Tensor) -> None:
        """Compare logits [positions, vocab] by what a reader notices: the likeliest tokens, and the probabilities."""
        reference = expected.float().log_softmax(-1)
        divergence = float((reference.exp() * (reference - got.float().log_softmax(-1))).sum(-1).mean())
        agreement = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
        self._predictions = (agreement, divergence)
        for where, allowed in (
            ("first tokens", agreement >= self._limits.agreement),
            ("probabilities", divergence <= self._limits.divergence),
        ):
            if not allowed and self._first is None:
                self._first = (_DEEPEST, where, *self._found)

    def check(self, name: str) -> Check:
        """What was found."""
        predictions = self._predictions or (None, None)
        if self._first is None:
            return Check(name, *self._found, True, "", *predictions)
        _, where, maximum, tolerance = self._first
        return Check(name, maximum, tolerance, False, where, *predictions)


@contextmanager
def traced(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Hidden states after each layer, [tokens, width] each, of the forward pass inside."""
    trace: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        trace.append(hidden[0].clone())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
