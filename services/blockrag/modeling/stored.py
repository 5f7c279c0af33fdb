"""Blocks between their two forms: arrays that any process can hold, and slots on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockrag.errors import DataError
from blockrag.modeling.narrow import quantised
from blockrag.modeling.slots import ResidentBlock, SlotShape
from blockrag.types import BlockKV

_NUMPY_DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8}


def stored_block(
    key: str, token_ids: NDArray[np.int64], keys: Tensor, values: Tensor, kv_dtype: torch.dtype
) -> BlockKV:
    """A block of unrotated ``keys`` in pair order and ``values``, both [layers, kv_heads, n, head_dim] on the CPU.

    They are in ``kv_dtype``, or for int8 in another type; the arrays are copies.
    """
    scales = None
    if kv_dtype == torch.int8:
        keys, values, (channels, by_slot) = quantised(keys, values)
        scales = (_to_numpy(channels), _to_numpy(by_slot))
    return BlockKV(key, token_ids.astype(np.int32), _to_numpy(keys), _to_numpy(values), scales)


def resident_block(block: BlockKV, shape: SlotShape, kv_dtype: torch.dtype, device: torch.device) -> ResidentBlock:
    """A copy of a block on the device. Raises DataError when its arrays are not of ``shape`` and ``kv_dtype``."""
    planes = (shape.num_layers, shape.num_kv_heads)
    slots = (*planes, block.num_slots, shape.head_dim)
    wanted: list[tuple[NDArray[Any], tuple[int, ...], Any]] = [
        (array, slots, _NUMPY_DTYPES[kv_dtype]) for array in (block.keys, block.values)
    ]
    if kv_dtype == torch.int8:
        found: tuple[NDArray[Any], NDArray[Any]] = block.scales or (np.empty(0), np.empty(0))
        wanted += [(found[0], (2, *planes, shape.head_dim), np.uint16), (found[1], slots[:3], np.uint16)]
    for array, expected, dtype in wanted:
        if array.shape != expected or array.dtype != dtype:
            raise DataError(
                f"block {block.key}: {array.dtype} {list(array.shape)} where this model needs "
                f"{np.dtype(dtype)} {list(expected)}"
            )
    # what comes from the object store is read-only; torch would warn about a tensor over it, and it is copied here
    both = torch.from_numpy(np.stack([block.keys, block.values]))
    if kv_dtype == torch.bfloat16:
        both = both.view(torch.bfloat16)
    if kv_dtype != torch.int8:
        return ResidentBlock(block.key, both.to(device))
    channels, by_slot = (torch.from_numpy(array.copy()).view(torch.bfloat16).to(device) for array, *_ in wanted[2:])
    return ResidentBlock(block.key, both.to(device), (channels, by_slot))


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    own = tensor.contiguous()
    if own.dtype == torch.bfloat16:
        own = own.view(torch.uint16)
    return own.numpy()
