"""Attention by the compiled kernel (``blockrag.modeling.native``), where the machine has it."""

from __future__ import annotations

import torch
from torch import Tensor

from blockrag.modeling.native.kernels import LARGEST_SUM, LOG2_E, Kernels, kernels


def attend(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, out: Tensor) -> bool:
    """An ``Attend`` for queries of float32 to slots of bfloat16 that lie as a sequence's own do."""
    if not Kernels.take(keys) or (values.dtype, values.stride()) != (keys.dtype, keys.stride()):
        return False
    if not (query.dtype == out.dtype == torch.float32 and query.is_contiguous() and out.is_contiguous()):
        return False
    compiled = kernels()
    if compiled is None:
        return False
    return compiled.attend(query, keys, values, total, scaling * LOG2_E, LARGEST_SUM, out)
