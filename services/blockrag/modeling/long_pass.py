"""Blocks and long prefills with the whole weights: torch's products, and one compiled function between two of them.

What a model's own modules do between the products (norms, rotation, gating, a copy for each change of type) takes a
third of a pass; so does attention to blocks of a hundred tokens, a call each. It stands for those modules, which are
its reference in the tests and what runs where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.modeling.attention.contract import RaggedBatch
from blockrag.modeling.linear_layers import joined
from blockrag.modeling.native.between_kernel import AttendedSlots, BetweenKernel
from blockrag.modeling.native.kernels import LARGEST_SUM
from blockrag.modeling.plain_decoder import PlainDecoder, PlainLayer, UnsuitableError, compiled_for
from blockrag.modeling.rotary import Rotation
from blockrag.modeling.support import ModelFacts

_CHUNK = 32
"""Widths must be multiples of it."""


@dataclass(frozen=True)
class _Products:
    """A layer's linear layers, transposed: [inputs, rows]."""

    attention: Tensor
    bias: Tensor | None
    output: Tensor
    gate_up: Tensor
    down: Tensor


class LongPass:
    """A forward pass over many tokens."""

    def __init__(self, model: PreTrainedModel, facts: ModelFacts, rotations: Sequence[Rotation]) -> None:
        """Takes the weights of ``model`` where they lie, if they were fused. Raises UnsuitableError."""
        compiled = compiled_for(model, facts, rotations)
        self._decoder = plain = PlainDecoder.of(model, facts)
        self._width, self._inner = len(plain.norm), len(plain.layers[0].gate)
        if self._width % _CHUNK or self._inner % _CHUNK:
            raise UnsuitableError(f"a width of {self._width} and {self._inner} inside the MLP")
        try:
            self._between = BetweenKernel(compiled.compiled, plain.heads, plain.kv_heads, plain.head_dim)
        except ValueError as error:
            raise UnsuitableError(str(error)) from error
        self._products = tuple(map(_products, plain.layers))
        self._plain_slots = facts.plain_positions

    def __call__(self, embeddings: Tensor, batch: RaggedBatch) -> Tensor | None:
        """Hidden states of every token behind the last norm, bfloat16 [tokens, width].

        Empty where the batch is captured: the last layer's keys and values are all that is wanted then.
        ``embeddings`` [tokens, width]. Keys and values go where the batch says. None where the model's modules must
        compute it.
        """
        captured = batch.capture
        if captured is not None and not captured.keys.dtype == captured.values.dtype == torch.bfloat16:
            return None
        if any(segment.first_slot + segment.length > self._plain_slots for segment in batch.segments):
            return None
        plain, between = self._decoder, self._between
        tokens, heads, kv_heads = len(embeddings), plain.heads, plain.kv_heads
        hidden = embeddings.float().contiguous()
        phases = batch.phases[0].squeeze(1)
        query, attended = (torch.empty(tokens, heads, plain.head_dim) for _ in range(2))
        narrow = torch.empty(tokens, heads, plain.head_dim, dtype=torch.bfloat16)
        own = torch.empty(3, kv_heads, tokens, plain.head_dim, dtype=torch.bfloat16)
        normed, added = (torch.empty(tokens, self._width, dtype=torch.bfloat16) for _ in range(2))
        gated = torch.empty(tokens, self._inner, dtype=torch.bfloat16)
        before: Tensor | None = None
        for number, (layer, products) in enumerate(zip(plain.layers, self._products, strict=True)):
            between.add_and_normalise(hidden, before, layer.attention_norm, plain.epsilon, normed)
            projected = torch.mm(normed, products.attention)
            if products.bias is not None:
                projected += products.bias
            keys, values, turned = own
            if captured is not None:
                keys, values = captured.keys[number], captured.values[number]
            norms = None if layer.query_norm is None or layer.key_norm is None else (layer.query_norm, layer.key_norm)
            between.split_and_rotate(projected, norms, phases, plain.epsilon, query, keys, turned, values)
            if captured is not None and number == len(plain.layers) - 1:
                return torch.empty(0)
            slots = _placed(batch, number, turned, values)
            if not between.attend(query, slots, plain.scaling, LARGEST_SUM, attended, narrow):
                return None
            torch.mm(narrow.view(tokens, -1), products.output, out=added)
            between.add_and_normalise(hidden, added, layer.mlp_norm, plain.epsilon, normed)
            between.gate(torch.mm(normed, products.gate_up), gated)
            before = torch.mm(gated, products.down, out=added)
        between.add_and_normalise(hidden, before, plain.norm, plain.epsilon, normed)
        return normed


def _products(layer: PlainLayer) -> _Products:
    return _Products(
        attention=joined(layer.attention).t(),
        bias=None if layer.biases is None else torch.cat(layer.biases),
        output=layer.output.t(),
        gate_up=joined((layer.gate, layer.up)).t(),
        down=layer.down.t(),
    )


def _placed(batch: RaggedBatch, layer: int, keys: Tensor, values: Tensor) -> list[AttendedSlots]:
    """What each segment attends to; a sequence's own slots are told of the new ones."""
    placed = []
    for segment in batch.segments:
        span = slice(segment.start, segment.start + segment.length)
        of_keys, of_values = keys[:, span], values[:, span]
        total = segment.first_slot + segment.length
        if segment.state is not None:
            all_keys, all_values = segment.state.layer(layer)
            all_keys[:, segment.first_slot : total] = of_keys
            all_values[:, segment.first_slot : total] = of_values
            of_keys, of_values = all_keys, all_values
        placed.append(AttendedSlots(of_keys, of_values, total, segment.length))
    return placed
