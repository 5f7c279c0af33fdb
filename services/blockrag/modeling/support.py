"""Which models can be driven over slots, and why another one cannot.

A model is driven without modelling code of its own: its rotary module is replaced by the identity and its attention
goes through ``AttentionInterface`` (``blockrag.modeling.attention``). That is right exactly when position enters the
model through one rotary module over whole heads, and attention is plain softmax over all earlier positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.slots import SlotShape

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary variants whose frequencies depend on the configuration alone, not on the length of the prompt."""


@dataclass(frozen=True)
class ModelFacts:
    """What driving a model over slots needs to know about it."""

    shape: SlotShape
    vocab_size: int
    max_positions: int
    """Longest slot list: the model's positions, or its sliding window where that is shorter."""
    frequencies: torch.Tensor
    """Rotary frequencies, float32 [head_dim / 2]."""
    attention_scaling: float
    """Factor on rotated queries and keys (yarn); 1 otherwise."""


def inspect_model(model: PreTrainedModel) -> ModelFacts:
    """Check ``model``, before anything of it is replaced. Raises UnsupportedModelError naming what is missing."""
    config = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    decoder = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if not isinstance(decoder, nn.Module) or not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(f"{name}: no decoder with a list of layers at model.layers")
    rotary = _rotary_module(name, model, decoder)
    _check_attention(name, model, config)
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    if any(module is None or not hasattr(module, "layer_idx") for module in attention):
        raise UnsupportedModelError(f"{name}: a layer without self_attn (hybrid models are not supported)")
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    frequencies, scaling = _frequencies(name, rotary, config)
    if len(frequencies) * 2 != head_dim:
        raise UnsupportedModelError(
            f"{name}: rotary embedding over {2 * len(frequencies)} of {head_dim} head dimensions "
            "(partial rotary factors are not supported)"
        )
    return ModelFacts(
        shape=SlotShape(num_layers=len(attention), num_kv_heads=kv_heads, head_dim=head_dim),
        vocab_size=int(config.vocab_size),
        max_positions=_max_positions(config),
        frequencies=frequencies,
        attention_scaling=scaling,
    )


def _rotary_module(name: str, model: PreTrainedModel, decoder: nn.Module) -> nn.Module:
    rotaries = [
        path for path, module in model.named_modules() if "inv_freq" in dict(module.named_buffers(recurse=False))
    ]
    if not rotaries:
        raise UnsupportedModelError(f"{name}: no rotary position embedding (learned positions or ALiBi)")
    if len(rotaries) > 1 or rotaries != ["model.rotary_emb"]:
        raise UnsupportedModelError(
            f"{name}: one rotary module at model.rotary_emb is needed, found {', '.join(rotaries)}"
        )
    rotary = decoder.rotary_emb
    rope_type = getattr(rotary, "rope_type", None)
    if rope_type not in ROPE_TYPES:
        supported = ", ".join(sorted(ROPE_TYPES))
        raise UnsupportedModelError(f"{name}: rope_type {rope_type!r} is not supported (supported: {supported})")
    assert isinstance(rotary, nn.Module)
    return rotary


def _frequencies(name: str, rotary: nn.Module, config: Any) -> tuple[torch.Tensor, float]:
    # made anew, because a model that was cast to bf16 holds rounded frequencies
    fresh = type(rotary)(config=config)
    frequencies = fresh.inv_freq
    if not isinstance(frequencies, torch.Tensor) or frequencies.ndim != 1:
        raise UnsupportedModelError(f"{name}: rotary frequencies that are no vector")
    return frequencies.detach().float(), float(getattr(fresh, "attention_scaling", 1.0))


def _check_attention(name: str, model: PreTrainedModel, config: Any) -> None:
    for field, feature in (
        ("attn_logit_softcapping", "softcapping of attention scores"),
        ("final_logit_softcapping", "softcapping of logits"),
        ("alibi", "ALiBi"),
        ("attention_chunk_size", "chunked attention"),
    ):
        if getattr(config, field, None):
            raise UnsupportedModelError(f"{name}: {feature} ({field}) is not supported")
    if any(path.endswith(".sinks") for path, _ in model.named_parameters()):
        raise UnsupportedModelError(f"{name}: attention sinks are not supported")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(f"{name}: layer types {', '.join(sorted(kinds))} are not supported")
    partial = getattr(config, "partial_rotary_factor", None)
    if partial is not None and partial != 1.0:
        raise UnsupportedModelError(f"{name}: partial rotary factor {partial} is not supported")


def _max_positions(config: Any) -> int:
    limits = [int(config.max_position_embeddings)]
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    # up to its window, a sliding layer is a plain one; Qwen2 names a window and switches it off by layer types
    if window is not None and (not kinds or "sliding_attention" in kinds):
        limits.append(int(window))
    return min(limits)
