"""float32 matrix products through oneDNN, and memory for them.

Torch hands them to MKL, which on processors of other makers than its own runs at half of what oneDNN's kernels reach
(measured on AMD Zen 5, one core: 103 against 206 GFLOP/s). The operator is the one torch's own compiler emits.
"""

from __future__ import annotations

from functools import cache
from types import MethodType

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
