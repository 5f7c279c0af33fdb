"""Low-rank adapters in training (LoRA, arXiv 2106.09685): frozen matrices, each with a trainable product beside it.

The forward pass computes with the merged matrix W + alpha/r · B·A, as serving does, so an adapted layer costs one
product instead of three, and what is trained is what the finished bundle computes, rounding included. The gradients of
A and B are the same as those of the two small products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockrag.errors import SetupError
from blockrag.modeling.adapter import Adapter
from blockrag.modeling.adapter_record import AdapterConfig

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer that get an adapter: all of them."""


class _MergedLinear(torch.autograd.Function):
    """y = x·(W + s·B·A)ᵀ, with gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        merged = torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scale)
        ctx.save_for_backward(x, merged, down, up)
        ctx.scale = scale
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, down, up = ctx.saved_tensors
        gradient = gradients[0]
        for_x = gradient @ merged if ctx.needs_input_grad[0] else None
        flat_x, flat = x.flatten(0, -2), gradient.flatten(0, -2)
        half_down, half_up = down.to(x.dtype), up.to(x.dtype)
        for_down = (flat @ half_up).T @ flat_x
        for_up = flat.T @ (flat_x @ half_down.T)
        return for_x, None, (for_down * ctx.scale).to(down.dtype), (for_up * ctx.scale).to(up.dtype), None


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter of rank r; ``lora_A`` [r, in] and ``lora_B`` [out, r] are float32."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        """B starts at zero: an adapter that was not trained changes nothing."""
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.scale = scale
        width, out = linear.in_features, linear.out_features
        self.lora_A = nn.Parameter(torch.randn(rank, width) / math.sqrt(width))
        self.lora_B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), self.weight.to(dtype)
        else:
            weight = self.weight
        y: Tensor = _MergedLinear.apply(x, weight, self.lora_A, self.lora_B, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    seed: int = 0,
    start: Adapter | None = None,
) -> None:
    """Freeze ``model`` and give every linear layer named in ``TARGET_MODULES`` an adapter, scaled by 1.

    ``start`` is an adapter to go on from; its targets and its scale hold then. Raises SetupError where there is no
    layer to adapt or ``start`` has another rank or other layers.
    """
    model.requires_grad_(False)
    targets = start.config.target_modules if start is not None else TARGET_MODULES
    found = [
        (f"{where}.{name}" if where else name, parent, name, layer)
        for where, parent in model.named_modules()
        for name, layer in parent.named_children()
        if name in targets and isinstance(layer, nn.Linear)
    ]
    if not found:
        raise SetupError(f"no linear layer is called {' or '.join(targets)}: nothing to adapt")
    if start is not None and start.config.rank != rank:
        raise SetupError(f"the bundle's adapter has rank {start.config.rank}, not {rank}: go on with that rank")
    if start is not None and start.tensors.keys() != {name for name, *_ in found}:
        raise SetupError("the bundle's adapter is of other layers than the model has")
    scale = start.config.alpha / rank if start is not None else 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for where, parent, name, layer in found:
            adapted = LoraLinear(layer, rank, scale)
            if start is not None:
                for parameter, values in zip((adapted.lora_A, adapted.lora_B), start.tensors[where], strict=True):
                    parameter.data.copy_(values)
            setattr(parent, name, adapted)


def trained_adapter(weights: Mapping[str, Tensor], rank: int, start: Adapter | None = None) -> Adapter:
    """The adapter in a whole state dict of a model that ``add_lora`` changed."""
    ends = ".lora_A"
    names = [name.removesuffix(ends) for name in weights if name.endswith(ends)]
    config = AdapterConfig(rank, float(rank), tuple(sorted({name.rpartition(".")[2] for name in names})))
    return Adapter(
        start.config if start is not None else config,
        {name: (weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]) for name in names},
    )
