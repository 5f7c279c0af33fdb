"""Decode steps and prefills of questions in one compiled call with weights of eight bits, for models of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.modeling.attention.contract import RaggedBatch
from blockrag.modeling.native.build import BFLOAT16, has_instructions
from blockrag.modeling.native.kernels import LARGEST_SUM
from blockrag.modeling.native.step_kernel import (
    GROUP,
    PackedDecoder,
    PackedLayer,
    PackedProduct,
    StepKernel,
    StepSegment,
    interleaved,
)
from blockrag.modeling.plain_decoder import PlainDecoder, PlainLayer, UnsuitableError, compiled_for
from blockrag.modeling.rotary import Rotation
from blockrag.modeling.support import ModelFacts

MOST_TOKENS = 512
"""Of a step: the most that was measured, where it still took 0.8 of the time of the whole weights' products, and with
AVX2 less of that of float32 ones."""
MOST_TOKENS_WITH_TILES = 16
"""The same on processors that multiply bfloat16 by tiles (AMX), which torch uses and the kernel does not."""
_PRODUCTS = ("attention", "output", "gate_up", "down")
"""Of a layer, as ``PackedLayer`` names them."""
_MOST_NUMBERS = MOST_TOKENS * 1536
"""Inputs of a product that a core's own cache holds, 1.5 MB: each block of rows reads them all again."""


class Step:
    """``SlotModel.forward`` for few tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        facts: ModelFacts,
        rotations: Sequence[Rotation],
        packed: Mapping[str, Tensor] | None = None,
        slots: torch.dtype = torch.bfloat16,
    ) -> None:
        """Packs the weights of ``model``, which keeps its own for longer inputs; takes what is in ``packed``, see
        ``packed_weights``. ``slots``: type of the sequences' slots. Raises UnsuitableError."""
        if slots != torch.bfloat16:
            raise UnsuitableError(f"the model computes in {model.dtype}, and its slots are {slots}")
        compiled = compiled_for(model, facts, rotations, stepped_dtypes())
        try:
            self._kernel = StepKernel(compiled.compiled, pack(model, facts, packed), LARGEST_SUM)
        except ValueError as error:
            raise UnsuitableError(f"{type(model).__name__}: {error}") from error
        self._embedding: nn.Module = model.get_input_embeddings()
        self._layers = facts.shape.num_layers
        self._plain_slots = facts.plain_positions
        most = MOST_TOKENS_WITH_TILES if has_instructions(("amx_bf16",)) else MOST_TOKENS
        self.most_tokens = max(1, min(most, _MOST_NUMBERS // self._kernel.most_inputs))
        """Of all sequences together; beyond, the whole weights are for it."""

    def __call__(self, input_ids: Tensor, batch: RaggedBatch, trace: list[Tensor] | None) -> Tensor | None:
        """Logits of each segment's last token, float32 [segments, vocab]; None where the model must compute them.

        ``input_ids`` [1, tokens]; ``trace`` gets hidden states after each layer, [tokens, width] each.
        """
        if input_ids.shape[1] > self.most_tokens:
            return None
        segments = []
        for segment in batch.segments:
            if segment.state is None or segment.first_slot + segment.length > self._plain_slots:
                return None
            segments.append(StepSegment(segment.state.slots, segment.first_slot, segment.length))
        hidden: Tensor = self._embedding(input_ids)[0].float()
        states = None if trace is None else torch.empty(self._layers, *hidden.shape)
        logits = self._kernel.step(hidden, batch.phases[0].squeeze(1), segments, states)
        if trace is not None and states is not None and logits is not None:
            trace.extend(states)
        return logits


def stepped_dtypes() -> tuple[torch.dtype, ...]:
    """Types of models that steps are for here: float32 too where the processor does not multiply bfloat16, so that
    models compute in it (``bundle.compute_dtype: auto``)."""
    return (torch.bfloat16,) if has_instructions(BFLOAT16) else (torch.bfloat16, torch.float32)


def packed_weights(decoder: PackedDecoder) -> dict[str, Tensor]:
    """The weights in eight bits of each product by its name, which ``pack`` takes instead of making them."""
    named = {"head": decoder.head.weights}
    for number, layer in enumerate(decoder.layers):
        named |= {f"layers.{number}.{part}": getattr(layer, part).weights for part in _PRODUCTS}
    return named


def pack(model: PreTrainedModel, facts: ModelFacts, packed: Mapping[str, Tensor] | None = None) -> PackedDecoder:
    """The weights of ``model`` as a step reads them. Raises UnsuitableError for a model of another kind."""
    plain = PlainDecoder.of(model, facts)

    def take(name: str, rows: int, weight: Callable[[], Tensor]) -> PackedProduct:
        there = (packed or {}).get(name)
        if there is not None:
            return PackedProduct(there, rows)
        try:
            return PackedProduct.pack(weight().detach())
        except ValueError as error:
            raise UnsuitableError(str(error)) from error

    layers = tuple(_pack_layer(layer, f"layers.{number}", take) for number, layer in enumerate(plain.layers))
    return PackedDecoder(plain, layers, take("head", len(plain.head), lambda: plain.head))


def _pack_layer(
    layer: PlainLayer, name: str, take: Callable[[str, int, Callable[[], Tensor]], PackedProduct]
) -> PackedLayer:
    if len(layer.gate) % GROUP:
        raise UnsuitableError(f"{len(layer.gate)} numbers inside the MLP: no multiple of {GROUP}")
    return PackedLayer(
        attention=take(f"{name}.attention", sum(map(len, layer.attention)), lambda: torch.cat(layer.attention)),
        output=take(f"{name}.output", len(layer.output), lambda: layer.output),
        gate_up=take(f"{name}.gate_up", 2 * len(layer.gate), lambda: interleaved(layer.gate, layer.up)),
        down=take(f"{name}.down", len(layer.down), lambda: layer.down),
        bias=None if layer.biases is None else torch.cat(layer.biases).float(),
    )
