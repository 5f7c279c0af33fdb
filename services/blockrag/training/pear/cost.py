"""What folded coefficients cost at inference: counted, and timed against the same model without them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from blockrag.modeling.pear import attention_heads, fold
from blockrag.modeling.pear_record import HeadCoefficient


@dataclass(frozen=True)
class FoldingCost:
    """The same prompt with and without coefficients."""

    parameters: tuple[int, int]
    """Without, with."""
    operations: tuple[int, int]
    """Operations that torch dispatches for one forward pass; without, with."""
    time_ratio: float
    """Median over interleaved pairs of the forward pass's time with coefficients over that without."""
    milliseconds: float
    """Median of a forward pass without."""
    tokens: int


@torch.inference_mode()
def folding_cost(
    model: PreTrainedModel, coefficients: Sequence[HeadCoefficient], *, tokens: int = 128, pairs: int = 15
) -> FoldingCost:
    """Measure with ``model``, which must not be folded yet and is not folded afterwards."""
    heads = attention_heads(model)
    views = [heads.columns(item.layer, item.head) for item in coefficients]
    original = [view.clone() for view in views]
    fold(model, coefficients)
    folded = [view.clone() for view in views]
    ids = torch.arange(tokens, device=model.device)[None] % int(model.config.vocab_size)
    weights = (original, folded)
    counts, sizes, times = [0, 0], [0, 0], []
    for number in range(pairs + 1):  # the first pair counts and warms up
        pair = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            _set(views, weights[which])
            if number == 0:
                counts[which] = _operations(model, ids)
                sizes[which] = sum(parameter.numel() for parameter in model.parameters())
            pair[which] = _seconds(model, ids)
        if number:
            times.append(pair)
    _set(views, original)
    return FoldingCost(
        parameters=(sizes[0], sizes[1]),
        operations=(counts[0], counts[1]),
        time_ratio=statistics.median(after / before for before, after in times),
        milliseconds=1000 * statistics.median(before for before, _ in times),
        tokens=tokens,
    )


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def _set(views: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
    for view, values in zip(views, weights, strict=True):
        view.copy_(values)


def _operations(model: PreTrainedModel, ids: torch.Tensor) -> int:
    counter = _Counter()
    with counter:
        model(ids, use_cache=False)
    return counter.operations


def _seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    _synchronize(ids)
    start = time.perf_counter()
    model(ids, use_cache=False)
    _synchronize(ids)
    return time.perf_counter() - start


def _synchronize(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
