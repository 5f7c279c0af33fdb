"""Forward passes of a stock model over a prompt in blocks, whatever its position embedding.

Block attention without a mask: each block is computed alone at its global positions, the blocks' K and V are joined,
and the last block continues from there. That equals one pass under the explicit block mask, and needs nothing of the
model but its cache: rotary and learned positions take ``position_ids``; ALiBi's bias grows with the key's position
from the block's start, and a constant per query leaves its softmax as it is. With one block before the last it is
plain causal attention. Gradients flow through.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from blockrag.errors import InvalidRequestError
from blockrag.modeling.pear import AttentionHeads


def prefill(model: PreTrainedModel, blocks: Sequence[Tensor]) -> DynamicCache:
    """K and V of ``blocks``, [samples, tokens] each, joined; every block sees itself only."""
    caches, start = [], 0
    for block in blocks:
        cache = DynamicCache()
        forward(model.base_model, block, cache, start)
        caches.append(cache)
        start += block.shape[1]
    if len(caches) == 1:
        return caches[0]
    joined = [
        (torch.cat([part.keys for part in parts], dim=-2), torch.cat([part.values for part in parts], dim=-2))
        for parts in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return cache_of(joined)


def forward(module: nn.Module, tokens: Tensor, cache: DynamicCache | None, start: int) -> Any:
    """``module`` (the language model, or its base without the head) over [samples, tokens] from position ``start``."""
    options: dict[str, Any] = {}
    if "position_ids" in inspect.signature(module.forward).parameters:
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        options["position_ids"] = positions.expand(tokens.shape[0], -1)
    return module(input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **options)


def cache_of(keys_and_values: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache over the given tensors, one pair per layer, [samples, kv_heads, tokens, head_dim]; nothing is copied."""
    cache = DynamicCache()
    for keys, values in keys_and_values:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raises InvalidRequestError when a prompt of ``length`` tokens is longer than the model's positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InvalidRequestError("n", f"a prompt of {length} tokens, where the model has {limit} positions")


class HeadTrace:
    """What the passes within ``recording`` left, per layer."""

    def __init__(self, layers: int) -> None:
        self.hidden: list[Tensor] = [torch.empty(0)] * layers
        """The last pass's input of each layer, [samples, tokens, width]."""
        self.heads: list[Tensor] = [torch.empty(0)] * layers
        """The last pass's heads' outputs side by side, before W_O: [samples, tokens, heads * head_dim]."""
        self.sums: list[Tensor | float] = [0.0] * layers
        """Sum of the heads' outputs over the positions of all passes, float32 [samples, heads * head_dim]."""
        self.layer_outputs: int | None = None
        """Values that a layer returns; None for a tensor that is not in a tuple."""


@contextmanager
def recording(heads: AttentionHeads) -> Iterator[HeadTrace]:
    """Records layers' inputs and heads' outputs of the passes inside."""
    trace = HeadTrace(len(heads.layers))

    def record_layer(layer: int) -> RemovableHandle:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.hidden[layer] = args[0] if args else kwargs["hidden_states"]

        return heads.layers[layer].register_forward_pre_hook(record, with_kwargs=True)

    def record_heads(layer: int) -> RemovableHandle:
        def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
            trace.heads[layer] = args[0]
            trace.sums[layer] = trace.sums[layer] + args[0].float().sum(1)

        return heads.outputs[layer].register_forward_pre_hook(record)

    def record_form(_module: nn.Module, _args: Any, output: Any) -> None:
        trace.layer_outputs = len(output) if isinstance(output, tuple) else None

    layers = range(len(heads.layers))
    handles = [*map(record_layer, layers), *map(record_heads, layers)]
    with removing([*handles, heads.layers[0].register_forward_hook(record_form)]):
        yield trace


@contextmanager
def removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
