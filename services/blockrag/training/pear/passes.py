"""The proxy task, and forward passes of a stock model over its prompts in blocks.

The proxy task: n random tokens, and the same once more; who reads the context can copy.

::

    full mask, as published     [first copy | second copy]
    block mask                  [random block] [first copy] [random block] … | [second copy]

Under the block mask the second copy is the final block, which attends to everything, and the first is one of several
passage blocks, in a place drawn per sample. The random blocks are needed: with the two copies alone, block-diagonal
causal attention whose last block sees everything *is* causal attention. So detection under the full mask can also run
on the same prompts (``distractors`` > 0), to tell what the mask changes from what the longer prompt changes.

Source: PEAR (arXiv 2409.19745), §3.1. A sample's tokens are drawn without replacement, so that each token names one
place; the published code draws with replacement from a vocabulary so large that it seldom matters.

Passes are the same whatever the position embedding. Block attention without a mask: each block is computed alone at its
global positions, the blocks' K and V are joined, and the last block continues from there. That equals one pass under
the explicit block mask, and needs nothing of the model but its cache: rotary and learned positions take
``position_ids``; ALiBi's bias grows with the key's position from the block's start, and a constant per query leaves its
softmax as it is. With one block before the last it is plain causal attention. Gradients flow through.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from blockrag.errors import InvalidRequestError
from blockrag.modeling.pear import AttentionHeads
from blockrag.modeling.pear_record import Mask


@dataclass(frozen=True)
class ProxyTask:
    """Prompts of one size under one mask."""

    n: int
    """Tokens of a copy."""
    mask: Mask = "full"
    distractors: int = 0
    """Blocks of n random tokens around the first copy."""

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InvalidRequestError("n", f"{self.n} tokens per copy; at least 2 are needed to copy one")
        if self.distractors < 0 or (self.mask == "block" and self.distractors == 0):
            raise InvalidRequestError(
                "distractors", f"{self.distractors}; the block mask differs from the full one from 1 on"
            )

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return (self.distractors + 2) * self.n

    def draw(self, samples: int, candidates: Tensor, generator: torch.Generator) -> Tensor:
        """Prompts of tokens out of ``candidates`` (int64 [any], each once): int64 [samples, length], on the CPU.

        The last n of a row are the second copy. Raises InvalidRequestError when there are too few candidates.
        """
        needed = (self.distractors + 1) * self.n
        if len(candidates) < needed:
            raise InvalidRequestError(
                "n",
                f"a prompt needs {needed} different tokens, where the vocabulary has {len(candidates)} to draw from",
            )
        order = torch.rand(samples, len(candidates), generator=generator).topk(needed, dim=1).indices
        blocks = candidates[order].view(samples, self.distractors + 1, self.n)
        place = torch.randint(self.distractors + 1, (samples,), generator=generator)
        first = blocks[torch.arange(samples), place]
        return torch.cat([blocks.flatten(1), first], dim=1)

    def blocks(self, tokens: Tensor) -> Sequence[Tensor]:
        """Cut prompts, [samples, length], into what attends only inside itself, and the second copy last."""
        before = tokens[:, : -self.n]
        passages = before.split(self.n, dim=1) if self.mask == "block" else (before,)
        return (*passages, tokens[:, -self.n :])


def ordinary_tokens(vocab_size: int, special: Sequence[int] = ()) -> Tensor:
    """Ids that prompts may be drawn from: all but the special ones, int64 [at most vocab_size]."""
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[[token for token in special if 0 <= token < vocab_size]] = False
    return allowed.nonzero()[:, 0]


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

    def record_layer(layer: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.hidden[layer] = args[0] if args else kwargs["hidden_states"]

    def record_heads(layer: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        trace.heads[layer] = args[0]
        trace.sums[layer] = trace.sums[layer] + args[0].float().sum(1)

    def record_form(_module: nn.Module, _args: Any, output: Any) -> None:
        trace.layer_outputs = len(output) if isinstance(output, tuple) else None

    with ExitStack() as hooks:
        for number, (layer, output) in enumerate(zip(heads.layers, heads.outputs, strict=True)):
            hooks.enter_context(layer.register_forward_pre_hook(partial(record_layer, number), with_kwargs=True))
            hooks.enter_context(output.register_forward_pre_hook(partial(record_heads, number)))
        hooks.enter_context(heads.layers[0].register_forward_hook(record_form))
        yield trace
