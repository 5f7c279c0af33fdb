"""One product where a layer has several of the same input: queries, keys and values; gate and up.

At one token a product is bound by reading its weights, and a large one reads them at twice the rate of three small
ones (measured: all linear layers of a step 36 to 21 ms). The layers stay where they are: the first computes the
product of all and the others take their part of it, so that any model whose attention and MLP call them with one
tensor can be fused, and a call with another tensor is computed alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
"""Names of a decoder layer's modules, and of the linear layers in them that are computed together."""


def fuse_linear_layers(layers: nn.ModuleList) -> int:
    """Fuse what ``GROUPS`` names in each decoder layer where it is plain linear layers; how many groups were fused.

    The weights are moved to one tensor each, group by group, and the layers' own become views of it.
    """
    fused = 0
    for layer in layers:
        for parent, names in GROUPS:
            found = [getattr(getattr(layer, parent, None), name, None) for name in names]
            if _together(found):
                _fuse(cast(Sequence[nn.Linear], found))
                fused += 1
    return fused


def _together(found: Sequence[object]) -> bool:
    linears = [each for each in found if type(each) is nn.Linear and "forward" not in vars(each)]
    if len(linears) != len(found):
        return False
    first = linears[0]
    kinds = {(each.in_features, each.weight.dtype, each.weight.device, each.bias is None) for each in linears}
    return len(kinds) == 1 and len({id(each.weight) for each in linears}) == len(linears) and not first.weight.is_meta


@torch.no_grad()
def _fuse(linears: Sequence[nn.Linear]) -> None:
    rows = [each.out_features for each in linears]
    weight = torch.cat([each.weight for each in linears])
    bias = None if linears[0].bias is None else torch.cat([each.bias for each in linears])
    for each, part in zip(linears, weight.split(rows), strict=True):
        each.weight = nn.Parameter(part, requires_grad=False)
    if bias is not None:
        for each, part in zip(linears, bias.split(rows), strict=True):
            each.bias = nn.Parameter(part, requires_grad=False)
    product = _Product(weight, bias, rows)
    for place, each in enumerate(linears):
        each.forward = _Part(product, place, each)  # type: ignore[method-assign, assignment]


class _Product(threading.local):
    """The product of all, kept until the last of the layers has taken its part.

    Of each thread its own: blocks are encoded beside the engine's steps.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: list[int]) -> None:
        self.weight, self.bias, self.rows = weight, bias, rows
        self.inputs: Tensor | None = None
        self.parts: list[Tensor | None] = [None] * len(rows)

    def compute(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.parts = [*F.linear(inputs, self.weight, self.bias).split(self.rows, dim=-1)]


class _Part:
    """``forward`` of one of the layers."""

    def __init__(self, product: _Product, place: int, layer: nn.Linear) -> None:
        self._product, self._place, self._layer = product, place, layer

    def __call__(self, inputs: Tensor) -> Tensor:
        product = self._product
        if self._place == 0:
            product.compute(inputs)
        part = product.parts[self._place] if product.inputs is inputs else None
        if part is None:
            return F.linear(inputs, self._layer.weight, self._layer.bias)
        product.parts[self._place] = None
        if self._place == len(product.parts) - 1:
            product.inputs = None
        return part
