"""Slots: a block's slots on the device, pieces of them, and the slot list of a running sequence.

A slot holds one position's K before rotation and V, for all layers. A prompt is a slot list: slot i stands at
position i, and its key is rotated by i when it is placed, once, in each layer as that layer rotates; nothing is ever
un-rotated.

In eight bits keys are kept by channel and values by slot, as in KIVI (arXiv 2402.02750, section 3): keys have channels
that are large in every slot, so before rotation each channel has a step and a middle of its own over the block's slots.
Values have no such channels; each slot has a step of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockrag.errors import DataError
from blockrag.modeling.native.kernels import Kernels, Piece, kernels
from blockrag.modeling.rotary import LayerRotaries, rotate_into
from blockrag.types import BlockKV

_LARGEST = 127
_LEAST = 2.0**-100
"""So that zeros divide by something."""

Scales = tuple[Tensor, Tensor]
"""Of keys, bfloat16 [2, layers, kv_heads, head_dim], the step and the middle of each channel; and of values, bfloat16
[layers, kv_heads, n], the step of each slot."""


def quantised(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Scales]:
    """``keys`` and ``values``, [layers, kv_heads, n, head_dim] each, as int8 of the same shape, and their scales."""
    wide = keys.float()
    middles = ((wide.amax(2) + wide.amin(2)) / 2).bfloat16()
    centred = wide - middles.float()[:, :, None]
    steps = (centred.abs().amax(2) / _LARGEST).clamp_min(_LEAST).bfloat16()
    narrow_keys = _rounded(centred, steps.float()[:, :, None])
    wide = values.float()
    by_slot = (wide.abs().amax(3) / _LARGEST).clamp_min(_LEAST).bfloat16()
    narrow_values = _rounded(wide, by_slot.float()[..., None])
    return narrow_keys, narrow_values, (torch.stack([steps, middles]), by_slot)


def widened(slots: Tensor, start: int, stop: int, scales: Scales) -> Tensor:
    """Slots ``start`` to ``stop`` of int8 [2, layers, kv_heads, n, head_dim] in float32."""
    (steps, middles), by_slot = scales
    keys = slots[0, :, :, start:stop].float() * steps.float()[:, :, None] + middles.float()[:, :, None]
    values = slots[1, :, :, start:stop].float() * by_slot[:, :, start:stop, None].float()
    return torch.stack([keys, values])


def _rounded(numbers: Tensor, steps: Tensor) -> Tensor:
    return (numbers / steps).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)


_BUFFER_STEP = 256
"""Buffers are cut to a multiple of this many slots, so that a released one fits the next sequence more often."""

_PLACED = (torch.bfloat16, torch.int8)
"""Types of blocks that the compiled kernels place."""
_ROTATED_AT_ONCE = 2**19
"""Numbers of K that are rotated in one step."""


@dataclass(frozen=True)
class SlotShape:
    """Sizes of one slot."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def numbers(self) -> int:
        """Numbers in K and V of one slot over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class ResidentBlock:
    """A block's slots on the device: the form an L1 keeps. A private copy; immutable."""

    key: str
    slots: Tensor
    """Unrotated K in pair order, and V, [2, layers, kv_heads, n, head_dim]; together, so that one copy places both."""
    scales: Scales | None = None
    """Of slots in int8."""

    @property
    def keys(self) -> Tensor:
        """Unrotated K in pair order, [layers, kv_heads, n, head_dim], as it is kept."""
        return self.slots[0]

    @property
    def values(self) -> Tensor:
        """V, same shape."""
        return self.slots[1]

    @cached_property
    def num_slots(self) -> int:
        """Positions that the block takes in a prompt."""
        return self.slots.size(3)

    @property
    def piece(self) -> Piece:
        """All of it."""
        return self.slots, 0, self.num_slots, self.scales

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return int(sum(tensor.nbytes for tensor in (self.slots, *(self.scales or ()))))


@dataclass(frozen=True)
class SlotSlice:
    """Consecutive slots of a resident block."""

    block: ResidentBlock
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.block.num_slots:
            raise ValueError(f"slots {self.start} to {self.stop} of a block of {self.block.num_slots}")

    @property
    def num_slots(self) -> int:
        """Positions that the slice takes in a prompt."""
        return self.stop - self.start

    @property
    def piece(self) -> Piece:
        """The block's slots, and which of them."""
        return self.block.slots, self.start, self.stop, self.block.scales


Slots = ResidentBlock | SlotSlice
"""What a prompt is composed of."""


def wide_slots(slots: Slots) -> Tensor:
    """K in pair order and V, [2, layers, kv_heads, n, head_dim], in a type to compute with; a view where it can be."""
    kept, start, stop, scales = slots.piece
    return kept[:, :, :, start:stop] if scales is None else widened(kept, start, stop, scales).bfloat16()


class SlotArena:
    """Buffers of released sequences, kept for the next ones: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, shape: SlotShape, dtype: torch.dtype, device: torch.device, keep_slots: int) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._keep_slots = keep_slots
        self._free: list[Tensor] = []

    def take(self, slots: int) -> Tensor:
        """A flat buffer of at least ``slots`` slots, contents finite but undefined."""
        least, most = slots * self._shape.numbers, (4 * slots + 1024) * self._shape.numbers
        fitting = [index for index, buffer in enumerate(self._free) if least <= len(buffer) <= most]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
        rounded = max(1, -(-slots // _BUFFER_STEP)) * _BUFFER_STEP
        return torch.zeros(rounded * self._shape.numbers, dtype=self._dtype, device=self._device)

    def view(self, buffer: Tensor, slots: int) -> Tensor:
        """The beginning of ``buffer`` as [2, layers, kv_heads, slots, head_dim], contiguous."""
        shape = self._shape
        size = (2, shape.num_layers, shape.num_kv_heads, slots, shape.head_dim)
        return buffer[: slots * shape.numbers].view(size)

    def give_back(self, buffer: Tensor) -> None:
        """Keep ``buffer`` for later, dropping the oldest ones beyond the limit."""
        self._free.append(buffer)
        while len(self._free) > 1 and sum(map(len, self._free)) > self._keep_slots * self._shape.numbers:
            self._free.pop(0)


class SequenceState:
    """The slot list of one running sequence: rotated keys and values, ready to be attended to.

    Made by ``SlotModel.new_sequence``, extended by ``SlotModel.forward``. Not thread-safe.
    """

    def __init__(
        self,
        arena: SlotArena,
        blocks: Sequence[Slots],
        capacity: int,
        rotary: LayerRotaries,
        first_position: int = 0,
    ) -> None:
        self._arena = arena
        self.first_position = first_position
        """Position of the first slot; those after it follow."""
        self.num_slots = sum(block.num_slots for block in blocks)
        """Slots in use."""
        self.capacity = self.num_slots + capacity
        """Slots that the sequence can hold in all: composed ones and those reserved."""
        self._buffer: Tensor | None = arena.take(self.capacity)
        self._slots = arena.view(self._buffer, self.capacity)
        self._place(blocks, rotary)

    @property
    def free_slots(self) -> int:
        """Tokens that may still be appended."""
        return self.capacity - self.num_slots

    @property
    def slots(self) -> Tensor:
        """All of them, rotated keys (pair order) and values, [2, layers, kv_heads, capacity, head_dim]; a view."""
        if self._buffer is None:
            raise ValueError("the sequence was released")
        return self._slots

    @property
    def released(self) -> bool:
        """Whether ``release`` was called."""
        return self._buffer is None

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Rotated keys (pair order) and values of a layer, both [kv_heads, capacity, head_dim], writable views."""
        slots = self.slots
        return slots[0, layer], slots[1, layer]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` slots, already written, as used."""
        self.num_slots += tokens

    def release(self) -> None:
        """Give the memory back. Calling it again does nothing; using the sequence afterwards is an error."""
        if self._buffer is not None:
            self._arena.give_back(self._buffer)
            self._buffer = None

    def __del__(self) -> None:
        if getattr(self, "_buffer", None) is not None:
            self.release()

    def _place(self, blocks: Sequence[Slots], rotary: LayerRotaries) -> None:
        if not blocks:
            return
        by_layer = rotary.phases([(self.first_position, self.first_position + self.num_slots)])
        compiled = kernels() if Kernels.take(self._slots) and len(rotary.runs) == 1 else None
        if compiled is not None:
            pieces = [block.piece for block in blocks]
            if all(slots.dtype in _PLACED and slots.is_contiguous() for slots, *_ in pieces):
                compiled.place(pieces, by_layer[0], self._slots)
                return
        placed = self._slots[:, :, :, : self.num_slots]
        torch.cat([wide_slots(block) for block in blocks], dim=3, out=placed)
        # as many layers at a time as the cores' shared cache holds
        for first, end in rotary.runs:
            for keys in placed[0, first:end].split(max(1, _ROTATED_AT_ONCE // placed[0, 0].numel())):
                rotate_into(keys, keys, by_layer[first])


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
