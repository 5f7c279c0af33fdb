"""The compiled kernels: for slots of bfloat16 on a CPU, and for policies; None where they cannot be had.

Each is an optimisation of something that is written in torch too, which is its reference in the tests and what runs
where the kernels do not: ``blockrag.modeling.slots`` places blocks, ``blockrag.modeling.attention`` attends,
``blockrag.modeling.refrag.policy`` rates chunks.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from blockrag.modeling.native.build import CannotBuildError, check_processor, library

_logger = logging.getLogger(__name__)

_WIDTHS = range(32, 257, 32)
"""Head dimensions that the kernels take."""
_WORTH_THREADS = 2**15
"""Scores, or numbers to place, from which several threads are worth waking."""
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Kernels:
    """Functions of the compiled library."""

    def __init__(self, path: str) -> None:
        """Raises OSError where the library does not load.

        It finds torch's OpenMP by name, since torch was imported: one pool of threads for both.
        """
        compiled = ctypes.CDLL(path)
        self._place, self._attend = compiled.place_slots, compiled.attend
        self._place.restype = None
        self._place.argtypes = [_INT, *[_POINTER] * 3, _INT, _INT, _POINTER, _INT, _POINTER, _INT]
        self._attend.restype = _INT
        self._attend.argtypes = [*[_POINTER] * 3, *[_INT] * 6, *[_FLOAT] * 3, _INT, _POINTER]

    @staticmethod
    def take(slots: Tensor) -> bool:
        """Whether the kernels work on slots like these, [..., slots, head_dim]."""
        return (
            slots.dtype == torch.bfloat16
            and slots.is_cpu
            and slots.size(-1) in _WIDTHS
            and slots.stride()[-2:] == (slots.size(-1), 1)
        )

    def place(self, pieces: Sequence[tuple[Tensor, int, int]], phases: Tensor, out: Tensor) -> None:
        """Copy pieces of blocks one behind the other to the beginning of ``out``, their keys rotated by ``phases``.

        A piece is (slots of a block [2, layers, kv_heads, n, head_dim], contiguous, start, stop); ``out`` has the same
        shape with other n, at least the pieces' sum; ``phases`` complex64 [that sum at least, head_dim / 2], row i for
        the slot that gets place i. Computed in float32, rounded once.
        """
        count, width = len(pieces), out.shape[-1]
        step = width * out.itemsize
        starts = [0, *accumulate(stop - start for _, start, stop in pieces)]
        whole = starts[-1]
        if whole > min(out.shape[3], len(phases)) or not phases.is_contiguous():
            raise ValueError(f"{whole} slots for {out.shape[3]} places and {len(phases)} phases")
        self._place(
            count,
            (_POINTER * count)(*[slots.data_ptr() + start * step for slots, start, _ in pieces]),
            (_INT * count)(*[slots.stride(2) for slots, _, _ in pieces]),
            (_INT * len(starts))(*starts),
            out.shape[1] * out.shape[2],
            width,
            phases.data_ptr(),
            _threads(whole * out.stride(3) * out.shape[1] * out.shape[2]),
            out.data_ptr(),
            out.stride(2),
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float, limit: float, out: Tensor
    ) -> bool:
        """What ``blockrag.modeling.attention.attend`` does, with queries and ``out`` in float32 and contiguous.

        ``scaling`` is for powers of two. False where a row's sum of weights is not between 1 / ``limit`` and ``limit``:
        ``out`` is of no use then.
        """
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


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_THREADS else 1


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled at the first call of this version on this machine; None where they cannot be had."""
    try:
        check_processor()
        return Kernels(str(library()))
    except (CannotBuildError, OSError) as error:
        _logger.info("slots are computed by torch, without compiled kernels: %s", error)
        return None
