"""A policy on the compiled kernel: its weights packed for it.

The scale and shift of a normalisation are folded into the linear layer behind it, the attention's scale into the
queries' weights: powers of two of scores are the softmax's exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blockrag.modeling.native.kernels import Kernels, PolicySizes, kernels
from blockrag.modeling.refrag.policy import ChunkPolicy

_PANEL = 32
"""Columns of a packed panel; of policy.c, as is the lanes' number."""
_LANES = 16


class CompiledPolicy:
    """What ``ChunkPolicy.rate`` gives, in a third of the time. A copy: later changes of the policy do not reach it."""

    def __init__(self, policy: ChunkPolicy, compiled: Kernels) -> None:
        """Raises ValueError for sizes that the kernel does not take."""
        config = policy.config
        if not takes(policy):
            raise ValueError(f"{config}: the kernel takes multiples of {_PANEL} only")
        self._compiled = compiled
        self._sizes = PolicySizes(
            encoder_width=config.encoder_width,
            features=policy.place.in_features,
            width=config.width,
            heads=config.heads,
            hidden=config.hidden,
            layers=config.layers,
            query=config.query,
            epsilon=policy.norm.eps,
        )
        with torch.no_grad():
            self._weights = torch.cat([part.flatten().float() for part in _parts(policy)])

    def rate(
        self, embeddings: Sequence[Tensor], features: NDArray[np.float32], question: Tensor
    ) -> NDArray[np.float32]:
        """Logits of one prompt's chunks, [chunks].

        ``embeddings``: of each passage's chunks, ``question``: of the question's, both [n, encoder width] and float32;
        ``features`` as ``chunk_features`` gives them. Raises ValueError where these do not fit.
        """
        logits = self._compiled.rate(self._sizes, self._weights, embeddings, torch.from_numpy(features), question)
        found: NDArray[np.float32] = logits.numpy()
        return found


def takes(policy: ChunkPolicy) -> bool:
    """Whether the kernel takes a policy of this one's sizes."""
    config = policy.config
    panels = (config.width // config.heads, config.hidden)
    return config.encoder_width % _LANES == 0 and not any(columns % _PANEL for columns in panels)


def compile_policy(policy: ChunkPolicy) -> CompiledPolicy | None:
    """The policy on the kernel; None where there is none for it."""
    compiled = kernels()
    return CompiledPolicy(policy, compiled) if compiled is not None and takes(policy) else None


def _parts(policy: ChunkPolicy) -> list[Tensor]:
    config = policy.config
    queries = torch.ones(3 * config.width, dtype=torch.float64)
    queries[: config.width] = math.log2(math.e) * (config.width // config.heads) ** -0.5
    parts = [*_linear(policy.embed, policy.scale), *_linear(policy.place)]
    if config.query:
        parts += [*_linear(policy.product), policy.asked]
    for layer in cast(Iterable[Any], policy.layers):
        parts += [
            *_linear(layer.attention, layer.before_attention, queries),
            *_linear(layer.attended),
            *_linear(layer.up, layer.before_hidden),
            *_linear(layer.down),
        ]
    weight, bias = _folded(policy.score, policy.norm)
    return [*parts, weight, policy.direct.weight, bias]


def _linear(layer: nn.Linear, normed: nn.LayerNorm | None = None, factors: Tensor | None = None) -> list[Tensor]:
    """A layer's bias and panels [columns / _PANEL, depth, _PANEL]; ``factors`` [columns] of its outputs."""
    weight, bias = _folded(layer, normed)
    if factors is not None:
        weight, bias = weight * factors[:, None], bias * factors
    return [bias, weight.view(-1, _PANEL, weight.shape[1]).transpose(1, 2)]


def _folded(layer: nn.Linear, normed: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight.double(), layer.bias.double()
    if normed is not None:
        weight, bias = weight * normed.weight, bias + weight @ normed.bias.double()
    return weight, bias
