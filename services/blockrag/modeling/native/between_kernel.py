"""What a pass over many tokens does between its products, compiled; the C code (between.c) believes what it is told, so
what it would read or write is checked here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockrag.modeling.native.kernels import check_heads, check_slots, check_tensors

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LANES = 16


class _Attended(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _INT) for name in ("plane", "total", "start", "tokens")),
    )


@dataclass(frozen=True)
class AttendedSlots:
    """What consecutive tokens of a batch attend to: the last of these slots are their own."""

    keys: Tensor
    values: Tensor
    """Of one layer, keys rotated, bfloat16 [kv_heads, ≥ total, head_dim]; a head's slots lie behind one another."""
    total: int
    """Slots in use, with the tokens' own."""
    tokens: int


class BetweenKernel:
    """The functions of between.c for heads of one kind, and one pass at a time."""

    def __init__(self, compiled: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        """``compiled``: a library with the functions. Raises ValueError for heads that they do not take."""
        check_heads(heads, kv_heads, head_dim)
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._normalise, self._split = compiled.add_and_normalise, compiled.split_and_rotate
        self._attend, self._gate = compiled.attend_segments, compiled.gate
        self._normalise.restype = self._split.restype = self._gate.restype = None
        self._attend.restype = _INT
        self._normalise.argtypes = [*[_POINTER] * 3, _INT, _INT, _FLOAT, _POINTER, _INT]
        self._split.argtypes = [*[_POINTER] * 4, *[_INT] * 4, _FLOAT, *[_POINTER] * 4, _INT]
        self._attend.argtypes = [_POINTER, _POINTER, *[_INT] * 4, *[_FLOAT] * 3, _INT, _POINTER, _POINTER]
        self._gate.argtypes = [_POINTER, _INT, _INT, _POINTER, _INT]

    def add_and_normalise(
        self, hidden: Tensor, added: Tensor | None, weight: Tensor, epsilon: float, out: Tensor
    ) -> None:
        """``added`` is added to ``hidden``, and RMSNorm of the sums put into ``out``.

        ``hidden`` float32, ``added`` and ``out`` bfloat16 [tokens, width]; ``weight`` float32 [width].
        """
        tokens, width = hidden.shape
        check_tensors(hidden=(hidden, torch.float32, (tokens, width)), weight=(weight, torch.float32, (width,)))
        check_tensors(out=(out, torch.bfloat16, (tokens, width)))
        if width % _LANES:
            raise ValueError(f"a width of {width}, which must be a multiple of {_LANES}")
        if added is not None:
            check_tensors(added=(added, torch.bfloat16, (tokens, width)))
        self._normalise(
            *(hidden.data_ptr(), None if added is None else added.data_ptr(), weight.data_ptr(), tokens, width),
            *(epsilon, out.data_ptr(), torch.get_num_threads()),
        )

    def split_and_rotate(
        self,
        projected: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        phases: Tensor,
        epsilon: float,
        query: Tensor,
        keys: Tensor,
        turned: Tensor,
        values: Tensor,
    ) -> None:
        """Queries, keys and values of ``projected``, where they are wanted.

        ``projected`` bfloat16 [tokens, (heads + 2 kv_heads) head_dim]; ``norms`` of queries' and keys' heads, float32
        [head_dim]; ``phases`` complex64 [tokens, head_dim / 2]. ``query`` float32 [tokens, heads, head_dim] gets the
        rotated queries, ``keys`` and ``values`` bfloat16 [kv_heads, tokens, head_dim] what a block keeps, ``turned``
        those keys rotated.
        """
        tokens, width = len(projected), self._head_dim
        rows = (self._heads + 2 * self._kv_heads) * width
        kept = (self._kv_heads, tokens, width)
        check_tensors(
            projected=(projected, torch.bfloat16, (tokens, rows)),
            phases=(phases, torch.complex64, (tokens, width // 2)),
            query=(query, torch.float32, (tokens, self._heads, width)),
            keys=(keys, torch.bfloat16, kept),
            turned=(turned, torch.bfloat16, kept),
            values=(values, torch.bfloat16, kept),
        )
        for norm in norms or ():
            check_tensors(norm=(norm, torch.float32, (width,)))
        query_norm, key_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        self._split(
            *(projected.data_ptr(), query_norm, key_norm, phases.data_ptr()),
            *(tokens, self._heads, self._kv_heads, width, epsilon),
            *(query.data_ptr(), keys.data_ptr(), turned.data_ptr(), values.data_ptr(), torch.get_num_threads()),
        )

    def attend(
        self,
        query: Tensor,
        segments: Sequence[AttendedSlots],
        scaling: float,
        limit: float,
        attended: Tensor,
        out: Tensor,
    ) -> bool:
        """Attention of each segment's tokens, one segment's behind the other's, to its slots up to themselves.

        ``query`` float32 [tokens, heads, head_dim]; ``attended`` the same, overwritten; ``out`` bfloat16, the same
        shape. ``scaling`` is for powers of two. False where a row's sum of weights is not between 1 / ``limit`` and
        ``limit``: ``out`` is of no use then.
        """
        tokens, start, placed = len(query), 0, []
        shape = (tokens, self._heads, self._head_dim)
        check_tensors(query=(query, torch.float32, shape), attended=(attended, torch.float32, shape))
        check_tensors(out=(out, torch.bfloat16, shape))
        for segment in segments:
            keys, values = segment.keys, segment.values
            check_slots(keys, values, self._head_dim)
            if len(keys) != self._kv_heads:
                raise ValueError(f"keys: {tuple(keys.shape)} for {self._kv_heads} heads of {self._head_dim}")
            if not 1 <= segment.tokens <= segment.total <= keys.shape[1]:
                raise ValueError(f"{segment.tokens} tokens of {segment.total} slots of {keys.shape[1]}")
            place = (keys.data_ptr(), values.data_ptr(), keys.stride(0), segment.total, start, segment.tokens)
            placed.append(_Attended(*place))
            start += segment.tokens
        if start != tokens or not placed:
            raise ValueError(f"{tokens} tokens, where the segments have {start}")
        unsuited: int = self._attend(
            *(query.data_ptr(), (_Attended * len(placed))(*placed), len(placed)),
            *(self._heads, self._kv_heads, self._head_dim, scaling, 1 / limit, limit),
            *(torch.get_num_threads(), attended.data_ptr(), out.data_ptr()),
        )
        return unsuited == 0

    def gate(self, rows: Tensor, out: Tensor) -> None:
        """``up * silu(gate)`` of rows [gate, up]: bfloat16 [tokens, 2 inner] to [tokens, inner]."""
        tokens, inner = out.shape
        check_tensors(rows=(rows, torch.bfloat16, (tokens, 2 * inner)), out=(out, torch.bfloat16, (tokens, inner)))
        if inner % _LANES:
            raise ValueError(f"{inner} numbers inside the MLP, which must be a multiple of {_LANES}")
        self._gate(rows.data_ptr(), tokens, inner, out.data_ptr(), torch.get_num_threads())
