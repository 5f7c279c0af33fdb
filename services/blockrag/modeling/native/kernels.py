"""The compiled kernels for slots of bfloat16 on a CPU; None where they cannot be had.

Each is an optimisation of something that is written in torch too, which is its reference in the tests and what runs
where the kernels do not: ``blockrag.modeling.slots`` places blocks, ``blockrag.modeling.attention`` attends. The
C code believes what it is told, so what it would read or write is checked here.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockrag.modeling.native.build import CannotBuildError, library, processor

_logger = logging.getLogger(__name__)

_WIDTHS = range(32, 257, 32)
"""Head dimensions that the kernels take."""
_WORTH_THREADS = 2**15
"""Scores, or numbers to place, from which several threads are worth waking."""
LOG2_E = 1.4426950408889634
"""Powers of two are computed faster than those of e: scores are scaled with it."""
LARGEST_SUM = 2.0**90
"""Of a row's weights, without its largest score subtracted: between this and its inverse nothing was out of range."""
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


Piece = tuple[Tensor, int, int, tuple[Tensor, Tensor] | None]
"""A block's slots [2, layers, kv_heads, n, head_dim], which of them from where to where, and the scales of those in
int8 (``blockrag.modeling.slots``); others are bfloat16."""


class Kernels:
    """Functions of the compiled library."""

    def __init__(self, compiled: Any) -> None:
        """``compiled``: a library with the functions of slots.c."""
        self.compiled = compiled
        self._place, self._attend = compiled.place_slots, compiled.attend
        self._place.restype = None
        self._place.argtypes = [_INT, *[_POINTER] * 5, _INT, _INT, _POINTER, _INT, _POINTER, _INT]
        self._attend.restype = _INT
        self._attend.argtypes = [*[_POINTER] * 3, *[_INT] * 6, *[_FLOAT] * 3, _INT, _POINTER]

    @classmethod
    def load(cls, path: Path) -> Kernels:
        """Those of a library; raises OSError where it does not load.

        It finds torch's OpenMP by name, since torch was imported: one pool of threads for both.
        """
        return cls(ctypes.CDLL(str(path)))

    @staticmethod
    def take(slots: Tensor) -> bool:
        """Whether the kernels work on slots like these, [..., slots, head_dim]."""
        return (
            slots.dtype == torch.bfloat16
            and slots.is_cpu
            and slots.size(-1) in _WIDTHS
            and slots.stride()[-2:] == (slots.size(-1), 1)
        )

    def place(self, pieces: Sequence[Piece], phases: Tensor, out: Tensor) -> None:
        """Copy pieces of blocks one behind the other to the beginning of ``out``, their keys rotated by ``phases``.

        ``out``, bfloat16, has the shape of a piece's slots with other n, at least the pieces' sum; all are contiguous.
        ``phases``: complex64 [that sum at least, head_dim / 2], row i for the slot that gets place i. Computed in
        float32, rounded once. Raises ValueError for anything else.
        """
        for slots, _, _, scales in ((out, 0, 0, None), *pieces):
            kind = torch.bfloat16 if scales is None else torch.int8
            if slots.dtype != kind or not (slots.is_cpu and slots.is_contiguous()):
                raise ValueError(f"{slots.dtype} {tuple(slots.shape)} {slots.stride()} on {slots.device} for slots")
        if out.dim() != 5 or out.shape[0] != 2 or out.shape[4] not in _WIDTHS or not out.shape[1] * out.shape[2]:
            raise ValueError(f"out: {tuple(out.shape)}")
        _, layers, kv_heads, room, width = out.shape
        for slots, start, stop, scales in pieces:
            if slots.shape != (2, layers, kv_heads, slots.size(-2), width):
                raise ValueError(f"a block of {tuple(slots.shape)} for slots of {tuple(out.shape)}")
            if not 0 <= start <= stop <= slots.shape[3]:
                raise ValueError(f"slots {start} to {stop} of a block of {slots.shape[3]}")
            if scales is not None:
                for found, shape in zip(scales, ((2, layers, kv_heads, width), slots.shape[1:4]), strict=True):
                    check_tensors(scales=(found, torch.bfloat16, shape))
        check_tensors(phases=(phases, torch.complex64, (*phases.shape[:1], width // 2)))
        starts = [0, *accumulate(stop - start for _, start, stop, _ in pieces)]
        whole = starts[-1]
        if whole > min(room, len(phases)):
            raise ValueError(f"{whole} slots for {room} places and {len(phases)} phases")
        count = len(pieces)
        of_keys = [None if scales is None else scales[0].data_ptr() for *_, scales in pieces]
        of_values = [None if scales is None else scales[1].data_ptr() + 2 * start for _, start, _, scales in pieces]
        self._place(
            count,
            (_POINTER * count)(*[slots.data_ptr() + start * width * slots.itemsize for slots, start, _, _ in pieces]),
            (_INT * count)(*[slots.shape[3] * width for slots, *_ in pieces]),
            (_POINTER * count)(*of_keys),
            (_POINTER * count)(*of_values),
            (_INT * len(starts))(*starts),
            layers * kv_heads,
            width,
            phases.data_ptr(),
            _threads(whole * width * layers * kv_heads),
            out.data_ptr(),
            room * width,
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, limit: float, out: Tensor
    ) -> bool:
        """What ``attention.contract.Attend`` says, with queries and ``out`` in float32 and contiguous.

        Raises ValueError for anything else. ``scaling`` is for powers of two. False where a row's sum of weights is not
        between 1 / ``limit`` and ``limit``: ``out`` is of no use then.
        """
        _check_attended(query, keys, values, total, out)
        tokens, heads, width = query.shape
        unsuited: int = self._attend(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tokens,
            heads,
            keys.shape[0],
            width,
            total,
            keys.stride(0),
            scaling,
            1 / limit,
            limit,
            _threads(tokens * heads * total),
            out.data_ptr(),
        )
        return unsuited == 0


def _check_attended(query: Tensor, keys: Tensor, values: Tensor, total: int, out: Tensor) -> None:
    """Raise ValueError, naming the argument, for what the compiled function would read or write wrongly."""
    if query.dim() != 3:
        raise ValueError(f"query: {tuple(query.shape)}")
    tokens, heads, width = shape = query.shape
    check_tensors(query=(query, torch.float32, shape), out=(out, torch.float32, shape))
    check_slots(keys, values, width)
    kv_heads, slots, _ = keys.shape
    if not 1 <= tokens <= total <= slots:
        raise ValueError(f"total: {total}, for {tokens} tokens and {slots} slots")
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(f"query: {heads} heads, for {kv_heads} of keys")


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError for heads that the compiled functions do not take."""
    if head_dim not in _WIDTHS or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} heads of {head_dim}, {kv_heads} of keys")


def check_slots(keys: Tensor, values: Tensor, width: int) -> None:
    """Raise ValueError, naming the argument, for what are no keys and values of heads of ``width`` to attend to."""
    if keys.dim() != 3 or keys.shape[2] != width or not Kernels.take(keys):
        raise ValueError(f"keys: {keys.dtype} {tuple(keys.shape)} {keys.stride()} on {keys.device}, heads of {width}")
    if values.shape != keys.shape or values.stride() != keys.stride() or values.dtype != keys.dtype:
        raise ValueError(f"values: {values.dtype} {tuple(values.shape)} {values.stride()} on {values.device}")


def check_tensors(**wanted: tuple[Tensor, torch.dtype, tuple[int, ...]]) -> None:
    """Raise ValueError, naming the argument, for what is not so, contiguous and on the CPU."""
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape or not (tensor.is_cpu and tensor.is_contiguous()):
            found = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} on {tensor.device}"
            raise ValueError(f"{name}: {found}, where {dtype} {tuple(shape)} is needed")
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(f"{name}: a view that is computed when it is read")


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_THREADS else 1


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled at the first call of this version on this machine; None where they cannot be had."""
    try:
        return Kernels.load(library(processor()))
    except (CannotBuildError, OSError) as error:
        _logger.info("slots are computed by torch, without compiled kernels: %s", error)
        return None
