"""A whole step of a Llama-like decoder in one compiled call, with weights of eight bits.

The C code (step.c) believes what it is told, so what it would read or write is checked here. What it stands for is the
model itself with the rounded weights, which is its reference in the tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockrag.modeling.native.kernels import check_heads, check_tensors
from blockrag.modeling.plain_decoder import PlainDecoder, PlainLayer

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LANES, _BLOCK, _LINE = 16, 32, 64
GROUP = 32
"""Inputs that share a row's scale, as in llama.cpp's Q8_0."""
_GROUP_LINES = 1 + GROUP // 2
_LARGEST = 127
_LEAST_SCALE = 2.0**-100
"""So that a group of zeros divides by something."""


class _Product(ctypes.Structure):
    _fields_ = (("weights", _POINTER), ("blocks", _INT), ("inputs", _INT))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Product) for name in ("attention", "output", "gate_up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "bias", "query_norm", "key_norm")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("layers", "width", "heads", "kv_heads", "head_dim", "inner")),
        *((name, _FLOAT) for name in ("epsilon", "scale", "least", "most")),
        ("layer", ctypes.POINTER(_Layer)),
        ("norm", _POINTER),
        ("head", _Product),
    )


class _Segment(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _INT) for name in ("plane", "before", "start", "tokens")),
    )


class _Buffers(ctypes.Structure):
    _fields_ = tuple(
        (name, _POINTER)
        for name in (
            "hidden",
            "phases",
            "projected",
            "query",
            "attended",
            "narrow",
            "normed",
            "widened",
            "counters",
            "trace",
            "logits",
        )
    )


@dataclass(frozen=True)
class PackedProduct:
    """A linear layer's weights in eight bits, with a scale for each row and group of inputs, as step.c reads them."""

    weights: Tensor
    """int8 [blocks of 32 rows, inputs / 32, 17, 64]: a line of the rows' scales in bfloat16, and one for each pair."""
    rows: int
    """Of the layer; what is beyond them in the last block is zeros."""

    @classmethod
    def pack(cls, weight: Tensor) -> PackedProduct:
        """Of ``weight`` [rows, inputs], rounded to the nearest of 255 steps of each group's largest.

        Raises ValueError where the inputs are no multiple of 32.
        """
        rows, inputs = weight.shape
        if inputs % GROUP:
            raise ValueError(f"a linear layer of {inputs} inputs, which must be a multiple of {GROUP}")
        grouped = weight.float().view(rows, -1, GROUP)
        scales = (grouped.abs().amax(2) / _LARGEST).clamp_min(_LEAST_SCALE).bfloat16()
        steps = (grouped / scales.float()[..., None]).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        missing = -rows % _BLOCK
        if missing:
            steps = torch.cat([steps, steps.new_zeros(missing, *steps.shape[1:])])
            scales = torch.cat([scales, scales.new_zeros(missing, scales.shape[1])])
        weights = steps.new_empty(len(steps) // _BLOCK, inputs // GROUP, _GROUP_LINES, _LINE)
        weights[:, :, 0] = scales.view(-1, _BLOCK, inputs // GROUP).transpose(1, 2).contiguous().view(torch.int8)
        lines = steps.view(-1, 2, _LANES, inputs // GROUP, GROUP // 2, 2).permute(0, 3, 4, 1, 5, 2)
        weights[:, :, 1:] = lines.reshape(*weights.shape[:2], GROUP // 2, _LINE)
        return cls(weights, rows)

    @property
    def inputs(self) -> int:
        """Of the layer."""
        return GROUP * self.weights.shape[1]

    def _struct(self) -> _Product:
        return _Product(self.weights.data_ptr(), self.weights.shape[0], self.inputs)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both, 16 of ``gate`` before 16 of ``up``, as a product that is gated has them; [2 rows, inputs]."""
    return torch.stack([half.reshape(-1, _LANES, half.shape[1]) for half in (gate, up)], 1).reshape(-1, gate.shape[1])


@dataclass(frozen=True)
class PackedLayer:
    """The products of a decoder layer."""

    attention: PackedProduct
    """Queries, keys and values, in this order."""
    output: PackedProduct
    gate_up: PackedProduct
    """``interleaved``."""
    down: PackedProduct
    bias: Tensor | None
    """Of ``attention``, float32."""


@dataclass(frozen=True)
class PackedDecoder:
    """All that a step reads but for slots and embeddings."""

    plain: PlainDecoder
    """Its norms and sizes."""
    layers: tuple[PackedLayer, ...]
    head: PackedProduct


@dataclass(frozen=True)
class StepSegment:
    """Consecutive tokens of a step that extend one sequence."""

    slots: Tensor
    """The sequence's slots, rotated, bfloat16 [2, layers, kv_heads, capacity, head_dim], contiguous."""
    before: int
    """Slots in use."""
    tokens: int


class StepKernel:
    """Computes steps of one decoder. Not thread-safe: it keeps its buffers."""

    def __init__(self, compiled: Any, decoder: PackedDecoder, limit: float) -> None:
        """``compiled``: a library with step.c's function. ``limit`` is as of ``Kernels.attend``.

        Raises ValueError, naming the part, for sizes and types that the function would read wrongly.
        """
        _check_decoder(decoder)
        self._decoder = decoder
        self._plain = plain = decoder.plain
        self._function = compiled.step
        self._function.restype = _INT
        self._function.argtypes = [_POINTER, _POINTER, _INT, _INT, _POINTER, _INT]
        self.width = plain.norm.shape[0]
        layers = (_Layer * len(decoder.layers))(*map(_layer_struct, decoder.layers, plain.layers))
        self._inner = decoder.layers[0].down.inputs
        self.most_inputs = max(self._inner, self.width, plain.heads * plain.head_dim)
        """Of a product."""
        self._struct = _Decoder(
            *(len(decoder.layers), self.width, plain.heads, plain.kv_heads, plain.head_dim, self._inner),
            *(plain.epsilon, plain.scaling, 1 / limit, limit),
            layers,
            plain.norm.data_ptr(),
            decoder.head._struct(),
        )
        self._kept: dict[str, Tensor] = {}

    def step(
        self, hidden: Tensor, phases: Tensor, segments: Sequence[StepSegment], trace: Tensor | None = None
    ) -> Tensor | None:
        """Logits of each segment's last token, float32 [segments, vocab]; keys and values go to the slots.

        ``hidden`` float32 [tokens, width], the tokens' embeddings, is overwritten. ``phases`` complex64
        [tokens, head_dim / 2] rotate the tokens; ``trace`` float32 [layers, tokens, width] gets hidden states after
        each layer. None where attention's sums of weights were not between
        1 / limit and limit: the model must compute this step. Raises ValueError for anything else.
        """
        decoder, plain = self._decoder, self._plain
        tokens, attended = len(hidden), plain.heads * plain.head_dim
        check_tensors(
            hidden=(hidden, torch.float32, (tokens, self.width)),
            phases=(phases, torch.complex64, (tokens, plain.head_dim // 2)),
        )
        if trace is not None:
            check_tensors(trace=(trace, torch.float32, (len(decoder.layers), tokens, self.width)))
        placed, start = [], 0
        for segment in segments:
            self._check_segment(segment)
            keys, values = segment.slots[0], segment.slots[1]
            place = (keys.data_ptr(), values.data_ptr(), keys.stride(1), segment.before, start, segment.tokens)
            placed.append(_Segment(*place))
            start += segment.tokens
        if start != tokens or not segments:
            raise ValueError(f"{tokens} tokens, where the segments have {start}")
        threads = torch.get_num_threads()
        logits = torch.empty(len(segments), decoder.head.weights.shape[0] * _BLOCK)
        buffers = _Buffers(
            hidden=hidden.data_ptr(),
            phases=phases.data_ptr(),
            projected=self._buffer("projected", torch.float32, tokens, decoder.layers[0].attention.rows).data_ptr(),
            query=self._buffer("query", torch.float32, tokens, attended).data_ptr(),
            attended=self._buffer("attended", torch.float32, tokens, attended).data_ptr(),
            # of bfloat16 where the processor multiplies it, in the first half of each, and else of float32
            narrow=self._buffer("narrow", torch.float32, tokens, max(attended, self._inner)).data_ptr(),
            normed=self._buffer("normed", torch.float32, threads * tokens, self.width).data_ptr(),
            widened=self._buffer("widened", torch.float32, threads * self.most_inputs, _BLOCK).data_ptr(),
            counters=self._buffer("counters", torch.int64, 1, 2 + 6 * len(decoder.layers)).zero_().data_ptr(),
            trace=None if trace is None else trace.data_ptr(),
            logits=logits.data_ptr(),
        )
        struct, count = ctypes.byref(self._struct), len(placed)
        unsuited: int = self._function(
            struct, (_Segment * count)(*placed), count, tokens, ctypes.byref(buffers), threads
        )
        return None if unsuited else logits[:, : decoder.head.rows]

    def _buffer(self, name: str, dtype: torch.dtype, rows: int, width: int) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.numel() < rows * width:
            kept = self._kept[name] = torch.empty(rows * width, dtype=dtype)
        return kept[: rows * width].view(rows, width)

    def _check_segment(self, segment: StepSegment) -> None:
        plain, slots = self._plain, segment.slots
        fixed = (2, len(plain.layers), plain.kv_heads, plain.head_dim)
        if slots.dim() != 5 or (*slots.shape[:3], slots.shape[4]) != fixed:
            raise ValueError(f"slots: {tuple(slots.shape)} for {fixed}")
        check_tensors(slots=(slots, torch.bfloat16, slots.shape))
        if segment.tokens < 1 or segment.before < 0 or segment.before + segment.tokens > slots.shape[3]:
            raise ValueError(f"{segment.tokens} tokens behind {segment.before} of {slots.shape[3]} slots")


def _layer_struct(layer: PackedLayer, plain: PlainLayer) -> _Layer:
    optional = (layer.bias, plain.query_norm, plain.key_norm)
    return _Layer(
        *(product._struct() for product in (layer.attention, layer.output, layer.gate_up, layer.down)),
        *(plain.attention_norm.data_ptr(), plain.mlp_norm.data_ptr()),
        *(None if tensor is None else tensor.data_ptr() for tensor in optional),
    )


def _check_decoder(decoder: PackedDecoder) -> None:
    plain = decoder.plain
    width, head_dim, heads, kv_heads = plain.norm.shape[0], plain.head_dim, plain.heads, plain.kv_heads
    if not decoder.layers:
        raise ValueError("no layers")
    check_heads(heads, kv_heads, head_dim)
    inner = decoder.layers[0].down.inputs
    if width % GROUP or inner % GROUP:
        raise ValueError(f"a width of {width} and {inner} inside the MLP: must be multiples of {GROUP}")
    rows = (heads + 2 * kv_heads) * head_dim
    for layer, own in zip(decoder.layers, plain.layers, strict=True):
        wanted = {
            "attention": (rows, width),
            "output": (width, heads * head_dim),
            "gate_up": (2 * inner, width),
            "down": (width, inner),
        }
        for name, shape in wanted.items():
            _check_product(name, getattr(layer, name), shape)
        sizes = {"attention_norm": width, "mlp_norm": width, "query_norm": head_dim, "key_norm": head_dim}
        read = [("bias", layer.bias, rows), *((name, getattr(own, name), size) for name, size in sizes.items())]
        for name, tensor, size in read:
            if tensor is not None:
                check_tensors(**{name: (tensor, torch.float32, (size,))})
        if (own.query_norm is None) != (own.key_norm is None):
            raise ValueError("norms of queries or of keys alone")
    check_tensors(norm=(plain.norm, torch.float32, (width,)))
    _check_product("head", decoder.head, (decoder.head.rows, width))


def _check_product(name: str, product: PackedProduct, shape: tuple[int, int]) -> None:
    weights, blocks = product.weights, -(-shape[0] // _BLOCK)
    lines = (blocks, shape[1] // GROUP, _GROUP_LINES, _LINE)
    if (product.rows, product.inputs) != shape:
        raise ValueError(f"{name}: {product.rows} rows of {product.inputs}, where {shape} is needed")
    check_tensors(**{name: (weights, torch.int8, lines)})
    if weights.data_ptr() % _LINE:
        raise ValueError(f"{name}: does not begin at a line of the processor's cache")
