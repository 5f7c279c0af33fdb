"""Fused products: the same numbers, the same modules, no second copy of the weights."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from blockrag.modeling.linear_layers import fuse_linear_layers
from blockrag.modeling.model import SlotModel
from tests.models import FAMILIES, make_tiny_model
from tests.unit.modeling.test_model import close, stock_logits, tokens


def storages(model: nn.Module) -> int:
    """Bytes of all memory that the parameters lie in, each counted once."""
    seen = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_compute_the_same(family: str, dtype: torch.dtype) -> None:
    stock = make_tiny_model(family).to(dtype)
    fused = copy.deepcopy(stock)
    assert fuse_linear_layers(fused.model.layers) == 6
    ids = torch.tensor([tokens(23)])
    with torch.inference_mode():
        got, expected = (each(ids, use_cache=False).logits.float() for each in (fused, stock))
    assert close(got, expected, 1e-5 if dtype == torch.float32 else 2e-2)
    assert storages(fused) == storages(stock)
    for name, parameter in stock.named_parameters():
        assert torch.equal(fused.get_parameter(name), parameter)


def test_a_call_with_another_input_is_computed_alone() -> None:
    layer = make_tiny_model("llama").model.layers[0]
    expected = copy.deepcopy(layer)
    fuse_linear_layers(nn.ModuleList([layer]))
    one, other = torch.randn(3, 32), torch.randn(5, 32)
    for module, inputs in (("q_proj", one), ("k_proj", other), ("k_proj", one), ("k_proj", one), ("v_proj", one)):
        got = getattr(layer.self_attn, module)(inputs)
        assert close(got, getattr(expected.self_attn, module)(inputs))
    assert layer.self_attn.q_proj.forward._product.inputs is None  # nothing is kept alive


def test_nothing_is_kept_after_a_pass() -> None:
    model = make_tiny_model("llama")
    fuse_linear_layers(model.model.layers)
    with torch.inference_mode():
        model(torch.tensor([tokens(5)]), use_cache=False)
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.gate_proj):
            product = module.forward._product
            assert product.inputs is None
            assert product.parts == [None] * len(product.parts)


def test_threads_share_nothing() -> None:
    """What encodes beside the engine runs the same layers at the same time."""
    layer = make_tiny_model("llama").model.layers[0]
    fuse_linear_layers(nn.ModuleList([layer]))
    attention = layer.self_attn
    one, other = torch.randn(3, 32), torch.randn(5, 32)
    expected = [attention.k_proj(inputs) for inputs in (one, other)]
    attention.q_proj(one)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(attention.q_proj, other).result()
        product = attention.q_proj.forward._product
        assert product.inputs is one
        assert close(attention.k_proj(one), expected[0])
        assert product.parts[1] is None  # taken, not computed again
        assert close(thread.submit(attention.k_proj, other).result(), expected[1])


class _Other(nn.Linear):
    """A linear layer of a kind of its own."""


@pytest.mark.parametrize("change", ["kind", "bias", "missing", "shared"])
def test_what_does_not_fit_is_left(change: str) -> None:
    model = make_tiny_model("llama")
    attention: Any = model.model.layers[1].self_attn
    if change == "kind":
        attention.k_proj.__class__ = _Other
    elif change == "bias":
        attention.k_proj.bias = nn.Parameter(torch.zeros(attention.k_proj.out_features))
    elif change == "missing":
        del attention.k_proj
    else:
        attention.v_proj.weight = attention.k_proj.weight
    assert fuse_linear_layers(model.model.layers) == 5


def test_a_slot_model_is_fused() -> None:
    stock = make_tiny_model("qwen2")
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    assert "forward" in vars(model.layers[0].self_attn.v_proj)
    asked = tokens(200, 4)
    state = model.new_sequence([], 200)
    assert close(model.forward([(state, asked)])[0], stock_logits(stock, [], asked)[-1])
