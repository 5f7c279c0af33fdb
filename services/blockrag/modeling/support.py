"""Which models can be driven over slots, and why another one cannot: what the configuration and the modules say.

A model is driven without modelling code of its own: its rotary modules are replaced by the identity and its attention
goes through ``AttentionInterface`` (``blockrag.modeling.attention``). That is right exactly when position enters the
model through rotations of queries and keys alone, and attention is a softmax over earlier positions: all of them, or
the last so many. How each layer rotates is measured, by ``blockrag.modeling.measuring``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.slots import SlotShape

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "longrope"})
"""Rotary variants whose frequencies, up to ``max_positions``, do not depend on the length of the prompt."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class ModelFacts:
    """What driving a model over slots needs to know about it."""

    name: str
    """Class and type, for messages."""
    shape: SlotShape
    vocab_size: int
    max_positions: int
    """Longest slot list."""
    window: int | None
    """How many positions back its sliding layers see, themselves included; None without such layers."""
    softcap: float | None
    """Bound of attention scores, where the configuration has one."""

    @property
    def plain_positions(self) -> int:
        """Longest slot list in which every layer sees all earlier positions."""
        return self.max_positions if self.window is None else min(self.max_positions, self.window)


def inspect_model(model: PreTrainedModel) -> ModelFacts:
    """Check ``model``, which may have no weights. Raises UnsupportedModelError naming what is missing."""
    config = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    decoder = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if not isinstance(decoder, nn.Module) or not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(f"{name}: no decoder with a list of layers at model.layers")
    _check_rotaries(name, model)
    _check_attention(name, model, config)
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    if any(module is None or not hasattr(module, "layer_idx") for module in attention):
        raise UnsupportedModelError(f"{name}: a layer without self_attn (hybrid models are not supported)")
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if head_dim % 2:
        raise UnsupportedModelError(f"{name}: heads of {head_dim} dimensions, which make no pairs")
    softcap = getattr(config, "attn_logit_softcapping", None)
    return ModelFacts(
        name=name,
        shape=SlotShape(num_layers=len(attention), num_kv_heads=kv_heads, head_dim=head_dim),
        vocab_size=int(config.vocab_size),
        max_positions=_max_positions(name, config),
        window=_window(config),
        softcap=float(softcap) if softcap else None,
    )


def rotary_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The rotary modules by their path."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    }


def _check_rotaries(name: str, model: PreTrainedModel) -> None:
    rotaries = rotary_modules(model)
    if not rotaries:
        raise UnsupportedModelError(f"{name}: no rotary position embedding (learned positions or ALiBi)")
    for rotary in rotaries.values():
        found = getattr(rotary, "rope_type", None)
        for rope_type in found.values() if isinstance(found, dict) else [found]:
            if rope_type not in ROPE_TYPES:
                supported = ", ".join(sorted(ROPE_TYPES))
                raise UnsupportedModelError(
                    f"{name}: rope_type {rope_type!r} is not supported (supported: {supported})"
                )


def _check_attention(name: str, model: PreTrainedModel, config: Any) -> None:
    for field, feature in (("alibi", "ALiBi"), ("attention_chunk_size", "chunked attention")):
        if getattr(config, field, None):
            raise UnsupportedModelError(f"{name}: {feature} ({field}) is not supported")
    if any(path.endswith((".sinks", ".sink")) for path, _ in model.named_parameters()):
        raise UnsupportedModelError(f"{name}: attention sinks are not supported")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= _LAYER_TYPES:
        raise UnsupportedModelError(f"{name}: layer types {', '.join(sorted(kinds - _LAYER_TYPES))} are not supported")


def _max_positions(name: str, config: Any) -> int:
    limits = [int(config.max_position_embeddings)]
    for rope in _rope_parameters(config):
        # Beyond its original length a model computes something else: longrope has other frequencies for the whole
        # prompt, and llama_4_scaling scales queries by their position, so that a passage's hidden states depend on its
        # place, which a cached block does not know.
        if rope.get("rope_type") == "longrope" or rope.get("llama_4_scaling_beta"):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if not original:
                raise UnsupportedModelError(f"{name}: no original_max_position_embeddings, up to which it is driven")
            limits.append(int(original))
    return min(limits)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    found = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in found.values() if isinstance(value, dict)]
    return by_kind or [found]


def _window(config: Any) -> int | None:
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    # Qwen2 names a window and switches it off by layer types
    return int(window) if window is not None and (not kinds or "sliding_attention" in kinds) else None
