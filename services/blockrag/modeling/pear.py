"""PEAR: attention heads re-weighted at no cost, by folding one coefficient per head into W_O when weights are loaded.

A head's contribution to the residual stream is W_O's columns of that head times the head's output, so scaling those
columns by τ scales the contribution; the bias belongs to no head. Folded weights have the same shape and run the same
operations as the original ones. Since τ changes hidden states it changes K and V of every later layer: the
coefficients are part of the bundle (``pear`` in its manifest) and of its fingerprint, and they are folded in one place
that every loader goes through, ``blockrag.modeling.model.load_stock_model``.

Source: PEAR (arXiv 2409.19745), §3.2. How coefficients are found: ``blockrag.training.pear``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blockrag.errors import BundleError, UnsupportedModelError
from blockrag.modeling.pear_record import HeadCoefficient

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense")


@dataclass(frozen=True)
class AttentionHeads:
    """Where a model's heads are. All layers have the same number of heads of the same width."""

    layers: tuple[nn.Module, ...]
    outputs: tuple[nn.Module, ...]
    """W_O of each layer: ``nn.Linear`` [width, heads * head_dim], or GPT-2's ``Conv1D``, which holds the transpose."""
    num_heads: int
    """Query heads; with grouped queries each still has its own columns of W_O."""
    head_dim: int

    @property
    def count(self) -> int:
        """Heads of all layers."""
        return len(self.layers) * self.num_heads

    def columns(self, layer: int, head: int) -> Tensor:
        """The head's part of W_O, a view: [width, head_dim], or [head_dim, width] of a ``Conv1D``."""
        module, span = self.outputs[layer], slice(head * self.head_dim, (head + 1) * self.head_dim)
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight[span] if isinstance(module, Conv1D) else weight[:, span]


def attention_heads(model: PreTrainedModel) -> AttentionHeads:
    """Find every layer's W_O. Raises UnsupportedModelError naming what is not as it must be.

    Nothing depends on the position embedding: rotary, learned and ALiBi models are found alike.
    """
    config = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: PEAR needs a decoder-only model")
    number = int(getattr(config, "num_hidden_layers", 0))
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == number > 0 and _attention(module[0]) is not None
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(f"{name}: no single list of {number} layers with attention")
    num_heads = int(config.num_attention_heads)
    outputs = []
    for index, layer in enumerate(lists[0]):
        output = _output(layer)
        if output is None:
            raise UnsupportedModelError(f"{name}: layer {index} has no attention with an output projection")
        outputs.append(output)
    inputs = {_inputs(output) for output in outputs}
    width = inputs.pop()
    if inputs or width % num_heads:
        raise UnsupportedModelError(f"{name}: the width of the heads differs between layers")
    return AttentionHeads(tuple(lists[0]), tuple(outputs), num_heads, width // num_heads)


@torch.no_grad()
def fold(model: PreTrainedModel, coefficients: Iterable[HeadCoefficient]) -> None:
    """Scale W_O's columns of each head by its τ, in place; computed in float32, kept in the weights' type.

    Raises BundleError for a head that the model does not have, UnsupportedModelError as ``attention_heads``.
    """
    heads = attention_heads(model)
    for item in coefficients:
        if item.layer >= len(heads.layers) or item.head >= heads.num_heads:
            raise BundleError(
                f"pear: head {item.layer}.{item.head}, where the model has {len(heads.layers)} layers of "
                f"{heads.num_heads} heads"
            )
        columns = heads.columns(item.layer, item.head)
        columns.copy_(columns.float() * item.tau)


@torch.no_grad()
def before_folding(
    model: PreTrainedModel, coefficients: Iterable[HeadCoefficient], tensors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter of folded weights, A and B by module, as one of the weights before ``coefficients`` are folded in."""
    heads = attention_heads(model)
    names = {module: name for name, module in model.named_modules()}
    found = {name: (down.clone(), up) for name, (down, up) in tensors.items()}
    for item in coefficients:
        name = names[heads.outputs[item.layer]]
        if name in found:
            found[name][0][:, item.head * heads.head_dim : (item.head + 1) * heads.head_dim] /= item.tau
    return found


def _attention(layer: nn.Module) -> nn.Module | None:
    found = (getattr(layer, name, None) for name in _ATTENTION_NAMES)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def _output(layer: nn.Module) -> nn.Module | None:
    attention = _attention(layer)
    found = (getattr(attention, name, None) for name in _OUTPUT_NAMES)
    return next((module for module in found if isinstance(module, nn.Linear | Conv1D)), None)


def _inputs(output: nn.Module) -> int:
    return int(output.nx if isinstance(output, Conv1D) else output.in_features)  # type: ignore[arg-type]
