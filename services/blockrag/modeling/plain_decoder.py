"""The parts of models whose layers are norm, attention, norm and gated MLP, each added to what it read: what the
compiled passes compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.modeling.native.kernels import LOG2_E, Kernels, kernels
from blockrag.modeling.rotary import Rotation
from blockrag.modeling.support import ModelFacts

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of such layers and nothing else."""


class UnsuitableError(Exception):
    """A model that has no compiled pass here; the message says why."""


@dataclass(frozen=True)
class PlainLayer:
    """A layer's weights, [rows, inputs] in the model's type; norms are float32."""

    attention: tuple[Tensor, Tensor, Tensor]
    """Of queries, keys and values."""
    biases: tuple[Tensor, Tensor, Tensor] | None
    output: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    """Over each head, before it is rotated; [head_dim]."""


@dataclass(frozen=True)
class PlainDecoder:
    """A decoder's weights but for its embeddings."""

    layers: tuple[PlainLayer, ...]
    norm: Tensor
    head: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    """Of every norm."""
    scaling: float
    """Of scores, for powers of two."""

    @classmethod
    def of(cls, model: PreTrainedModel, facts: ModelFacts) -> PlainDecoder:
        """The parts of ``model``. Raises UnsuitableError where it has others."""
        config: Any = model.config
        if config.model_type not in FAMILIES:
            raise UnsuitableError(f"models of type {config.model_type} have no compiled pass")
        if config.hidden_act not in ("silu", "swish"):
            raise UnsuitableError(f"an MLP with {config.hidden_act}")
        decoder: Any = model.model
        head: Any = model.get_output_embeddings()
        if head.bias is not None:
            raise UnsuitableError("an output embedding with a bias")
        layers = tuple(map(_layer, decoder.layers))
        norms = [decoder.norm, *(norm for layer in decoder.layers for norm in _norms(layer))]
        epsilons = {float(norm.variance_epsilon) for norm in norms}
        scalings = {float(layer.self_attn.scaling) for layer in decoder.layers}
        if len(epsilons) != 1 or len(scalings) != 1:
            raise UnsuitableError("layers that differ in their norms or in the scale of scores")
        return cls(
            layers=layers,
            norm=_floats(decoder.norm.weight),
            head=head.weight.detach(),
            heads=int(config.num_attention_heads),
            kv_heads=facts.shape.num_kv_heads,
            head_dim=facts.shape.head_dim,
            epsilon=epsilons.pop(),
            scaling=scalings.pop() * LOG2_E,
        )


def compiled_for(
    model: PreTrainedModel,
    facts: ModelFacts,
    rotations: Sequence[Rotation],
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
) -> Kernels:
    """The kernels, where they are for ``model``, its place, and its type by being in ``dtypes``. Raises
    UnsuitableError."""
    compiled = kernels()
    if compiled is None:
        raise UnsuitableError("there are no compiled kernels for this processor")
    if model.device.type != "cpu" or model.dtype not in dtypes:
        raise UnsuitableError(f"the model computes in {model.dtype} on {model.device.type}")
    if len(set(rotations)) != 1 or not rotations[0].plain:
        raise UnsuitableError("layers that rotate otherwise than whole heads by halves, all alike")
    if facts.softcap is not None:
        raise UnsuitableError("bounded scores")
    return compiled


def _layer(layer: Any) -> PlainLayer:
    attention, mlp = layer.self_attn, layer.mlp
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    if any(part.bias is not None for part in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise UnsuitableError("a bias of attention's output or in the MLP")
    biases = [part.bias for part in inputs if part.bias is not None]
    if biases and len(biases) != len(inputs):
        raise UnsuitableError("a bias of some of queries, keys and values")
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else _floats(norm.weight) for norm in norms)
    query, key, value = (part.weight.detach() for part in inputs)
    return PlainLayer(
        attention=(query, key, value),
        biases=(biases[0].detach(), biases[1].detach(), biases[2].detach()) if biases else None,
        output=attention.o_proj.weight.detach(),
        gate=mlp.gate_proj.weight.detach(),
        up=mlp.up_proj.weight.detach(),
        down=mlp.down_proj.weight.detach(),
        attention_norm=_floats(layer.input_layernorm.weight),
        mlp_norm=_floats(layer.post_attention_layernorm.weight),
        query_norm=query_norm,
        key_norm=key_norm,
    )


def _norms(layer: Any) -> list[Any]:
    found = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in found if norm is not None)]


def _floats(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()
