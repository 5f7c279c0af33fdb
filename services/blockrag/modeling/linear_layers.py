"""Linear layers faster: float32 products through oneDNN, one product where a layer has several of the same input.

Torch hands float32 products to MKL, which on processors of other makers than its own runs at half of what oneDNN's
kernels reach (measured on AMD Zen 5, one core: 103 against 206 GFLOP/s). The operator is the one torch's own compiler
emits.

Queries, keys and values, gate and up: at one token a product is bound by reading its weights, and a large one reads
them at twice the rate of three small ones (measured: all linear layers of a step 36 to 21 ms). The layers stay where
they are: the first computes the product of all and the others take their part of it, so that any model whose attention
and MLP call them with one tensor can be fused, and a call with another tensor is computed alone.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Sequence
from functools import cache
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LONG_INPUT = 128
"""Tokens from which linear layers go through oneDNN. It packs the weights in every call, which pays off slowly."""


@cache
def _operator_works() -> bool:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    rows, weight = torch.ones(2, 3), torch.ones(4, 3)
    try:
        return bool(torch.equal(linear(rows, weight), rows @ weight.t()))
    except RuntimeError:
        return False


def onednn_available(device: torch.device) -> bool:
    """Whether ``linear`` runs on ``device``."""
    return device.type == "cpu" and _operator_works()


def keep_freed_memory() -> None:
    """Let this process keep freed memory, up to 62 MiB of it, instead of giving it back at once.

    Attention frees and allocates a few megabytes per head and layer. glibc returns blocks above a threshold to the
    system and faults them in again page by page, which took a third of a prefill's time. The threshold follows the
    largest such block that was freed, up to 32 MiB; nothing of this one is ever touched.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def give_freed_memory_back() -> None:
    """Return to the system what this process has freed; glibc keeps much of it between what is still used."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias`` for float32 CPU matrices [n, k] and [m, k]; any strides of ``weight``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def speed_up_linear_layers(model: nn.Module) -> None:
    """Let the float32 linear layers of ``model`` use oneDNN for long inputs; does nothing where it is not there."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            if not onednn_available(module.weight.device):
                return
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    if inputs.numel() < _LONG_INPUT * layer.in_features:
        return F.linear(inputs, layer.weight, layer.bias)
    rows = inputs.reshape(-1, layer.in_features)
    return linear(rows, layer.weight, layer.bias).view(*inputs.shape[:-1], layer.out_features)


GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
"""Names of a decoder layer's modules, and of the linear layers in them that are computed together."""


def fuse_linear_layers(layers: nn.ModuleList) -> int:
    """Fuse what ``GROUPS`` names in each decoder layer where it is plain linear layers; how many groups were fused.

    The weights are moved to one tensor each, group by group, where they do not lie so already, and the layers' own
    become views of it.
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
    weight = joined([each.weight for each in linears])
    bias = None if linears[0].bias is None else joined([each.bias for each in linears])
    for each, part in zip(linears, weight.split(rows), strict=True):
        each.weight = nn.Parameter(part, requires_grad=False)
    if bias is not None:
        for each, part in zip(linears, bias.split(rows), strict=True):
            each.bias = nn.Parameter(part, requires_grad=False)
    product = _Product(weight, bias, rows)
    for place, each in enumerate(linears):
        each.forward = _Part(product, place, each)  # type: ignore[method-assign, assignment]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """All rows in one tensor: the memory that they lie in, where they lie one behind the other, else a copy."""
    first = parts[0]
    end = first.storage_offset()
    for part in parts:
        together = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (together and part.is_contiguous() and part.storage_offset() == end):
            return torch.cat([*parts])
        end += part.numel()
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


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
