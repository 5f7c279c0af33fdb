"""Comparing two computations layer by layer, and naming the first layer where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
    """Where it first differs, like "layer 3 (encode)" or "logits"; empty when it passed."""


class Difference:
    """Keeps the difference of the result, and of the first layer that differs too much."""

    def __init__(self, relative: float, result: str = "logits") -> None:
        """``relative`` is the difference allowed, as a fraction of the largest reference value; 0: to the bit.

        ``result`` names what is compared last.
        """
        self._relative = relative
        self._result = result
        self._first: tuple[int, str, float, float] | None = None
        self._found = (0.0, 0.0)

    def compare(self, where: str, depth: int, got: Tensor, expected: Tensor) -> None:
        """Compare what was computed ``where`` (a layer, or the result), ``depth`` layers deep."""
        maximum = float((got.float() - expected.float()).abs().max())
        tolerance = self._relative * max(1e-6, float(expected.float().abs().max()))
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

    def check(self, name: str) -> Check:
        """What was found."""
        if self._first is None:
            return Check(name, *self._found, True, "")
        _, where, maximum, tolerance = self._first
        return Check(name, maximum, tolerance, False, where)


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
