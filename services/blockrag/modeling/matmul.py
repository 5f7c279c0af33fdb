"""float32 matrix products through oneDNN.

Torch hands them to MKL, which on processors of other makers than its own runs at half of what oneDNN's kernels reach
(measured on AMD Zen 5, one core: 103 against 206 GFLOP/s). The operator is the one torch's own compiler emits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def _operator_works() -> bool:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    rows, weight = torch.ones(2, 3), torch.ones(4, 3)
    try:
        return bool(torch.equal(linear(rows, weight), rows @ weight.t()))
    except (RuntimeError, NotImplementedError):
        return False


def onednn_available(device: torch.device) -> bool:
    """Whether ``linear`` runs on ``device``."""
    return device.type == "cpu" and _operator_works()


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T`` for float32 CPU matrices [n, k] and [m, k]; any strides of ``weight``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return product
