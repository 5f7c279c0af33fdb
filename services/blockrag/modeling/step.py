"""Decode steps and prefills of questions in one compiled call with weights of eight bits, for models of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.modeling.attention.base import RaggedBatch
from blockrag.modeling.attention.tiled import LEAST_SUM, LOG2_E
from blockrag.modeling.native.kernels import kernels
from blockrag.modeling.native.processor import has_instructions
from blockrag.modeling.native.step import (
    GROUP,
    PackedDecoder,
    PackedLayer,
    PackedProduct,
    StepKernel,
    StepSegment,
    interleaved,
)
from blockrag.modeling.rotary import Rotation
from blockrag.modeling.support import ModelFacts

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose layers are norm, attention, norm and gated MLP, each added to what it read, and nothing else."""
MOST_TOKENS = 512
"""Of a step: the most that was measured, where it still took 0.8 of the time of the whole weights' products."""
MOST_TOKENS_WITH_TILES = 16
"""The same on processors that multiply bfloat16 by tiles (AMX), which torch uses and the kernel does not."""
_MOST_NUMBERS = MOST_TOKENS * 1536
"""Inputs of a product that a core's own cache holds, 1.5 MB: each block of rows reads them all again."""


class UnsuitableError(Exception):
    """A model that has no compiled step here; the message says why."""


class Step:
    """``SlotModel.forward`` for few tokens."""

    def __init__(self, model: PreTrainedModel, facts: ModelFacts, rotations: Sequence[Rotation]) -> None:
        """Packs the weights of ``model``, which keeps its own for longer inputs. Raises UnsuitableError."""
        compiled = kernels()
        if compiled is None:
            raise UnsuitableError("there are no compiled kernels for this processor")
        if model.device.type != "cpu" or model.dtype != torch.bfloat16:
            raise UnsuitableError(f"the model computes in {model.dtype} on {model.device.type}")
        if len(set(rotations)) != 1 or not rotations[0].plain:
            raise UnsuitableError("layers that rotate otherwise than whole heads by halves, all alike")
        if facts.softcap is not None:
            raise UnsuitableError("bounded scores")
        try:
            self._kernel = StepKernel(compiled.compiled, pack(model, facts), 1 / LEAST_SUM)
        except ValueError as error:
            raise UnsuitableError(f"{type(model).__name__}: {error}") from error
        self._embedding: nn.Module = model.get_input_embeddings()
        self._layers = facts.shape.num_layers
        self._plain_slots = facts.plain_positions
        most = MOST_TOKENS_WITH_TILES if has_instructions(("amx_bf16",)) else MOST_TOKENS
        self.most_tokens = max(1, min(most, _MOST_NUMBERS // self._kernel.most_inputs))
        """Of all sequences together; beyond, the whole weights are for it."""

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return self._kernel.nbytes

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


def pack(model: PreTrainedModel, facts: ModelFacts) -> PackedDecoder:
    """The weights of ``model`` as a step reads them. Raises UnsuitableError for a model of another kind."""
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise UnsuitableError(f"models of type {config.model_type} have no compiled step")
    if config.hidden_act not in ("silu", "swish"):
        raise UnsuitableError(f"an MLP with {config.hidden_act}")
    decoder: Any = model.model
    layers = tuple(_pack_layer(layer) for layer in decoder.layers)
    head: Any = model.get_output_embeddings()
    if head.bias is not None:
        raise UnsuitableError("an output embedding with a bias")
    heads = int(config.num_attention_heads)
    norms = [decoder.norm, *(norm for layer in decoder.layers for norm in _norms(layer))]
    epsilons = {float(norm.variance_epsilon) for norm in norms}
    scalings = {float(layer.self_attn.scaling) for layer in decoder.layers}
    if len(epsilons) != 1 or len(scalings) != 1:
        raise UnsuitableError("layers that differ in their norms or in the scale of scores")
    return PackedDecoder(
        layers=layers,
        norm=_floats(decoder.norm.weight),
        head=_packed(head.weight),
        heads=heads,
        kv_heads=facts.shape.num_kv_heads,
        head_dim=facts.shape.head_dim,
        epsilon=epsilons.pop(),
        scaling=scalings.pop() * LOG2_E,
    )


def _pack_layer(layer: Any) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    if any(part.bias is not None for part in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise UnsuitableError("a bias of attention's output or in the MLP")
    if mlp.gate_proj.out_features % GROUP:
        raise UnsuitableError(f"{mlp.gate_proj.out_features} numbers inside the MLP: no multiple of {GROUP}")
    biases = [part.bias for part in inputs]
    if any(bias is not None for bias in biases) and any(bias is None for bias in biases):
        raise UnsuitableError("a bias of some of queries, keys and values")
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else _floats(norm.weight) for norm in norms)
    return PackedLayer(
        attention=_packed(torch.cat([part.weight for part in inputs])),
        output=_packed(attention.o_proj.weight),
        gate_up=_packed(interleaved(mlp.gate_proj.weight, mlp.up_proj.weight)),
        down=_packed(mlp.down_proj.weight),
        attention_norm=_floats(layer.input_layernorm.weight),
        mlp_norm=_floats(layer.post_attention_layernorm.weight),
        bias=None if biases[0] is None else _floats(torch.cat(biases)),
        query_norm=query_norm,
        key_norm=key_norm,
    )


def _norms(layer: Any) -> list[Any]:
    found = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in found if norm is not None)]


def _packed(weight: Tensor) -> PackedProduct:
    try:
        return PackedProduct.pack(weight.detach())
    except ValueError as error:
        raise UnsuitableError(str(error)) from error


def _floats(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()
