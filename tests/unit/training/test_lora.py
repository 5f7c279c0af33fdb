from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blockrag.errors import SetupError
from blockrag.training.lora import TARGET_MODULES, LoraLinear, add_lora
from tests.models import make_tiny_model

IDS = torch.arange(7, 47)[None]


def trained(bias: bool = False, rank: int = 3, scale: float = 2.0) -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(6, 5, bias=bias), rank, scale)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_product_beside_the_layer(bias: bool) -> None:
    layer = trained(bias)
    x = torch.randn(2, 4, 6, requires_grad=True)
    weight = torch.randn(2, 4, 5)

    (layer(x) * weight).sum().backward()
    assert x.grad is not None and layer.lora_A.grad is not None and layer.lora_B.grad is not None
    got = [x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]

    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    beside = F.linear(x, layer.weight, layer.bias) + layer.scale * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    torch.testing.assert_close(layer(x), beside)
    (beside * weight).sum().backward()
    for ours, reference in zip(got, (x.grad, layer.lora_A.grad, layer.lora_B.grad), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_finite_differences_agree() -> None:
    layer = trained().double()

    def loss(down: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        from blockrag.training.lora import _MergedLinear

        y: torch.Tensor = _MergedLinear.apply(x, layer.weight, down, up, layer.scale)  # type: ignore[no-untyped-call]
        return y

    inputs = (layer.lora_A, layer.lora_B, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(loss, inputs)


def test_an_adapter_that_was_not_trained_changes_nothing_and_all_else_is_frozen() -> None:
    model = make_tiny_model()
    with torch.no_grad():
        before = model(IDS).logits

    add_lora(model, 4)

    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before)
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert len(layers) == model.config.num_hidden_layers * len(TARGET_MODULES)
    assert "model.layers.0.self_attn.q_proj" in layers
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}


def test_equal_seeds_give_equal_adapters_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = make_tiny_model(), make_tiny_model(), make_tiny_model()
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        add_lora(model, 2, seed=seed)

    assert torch.equal(torch.rand(3), expected)
    layers = [
        (one, same, different)
        for one, same, different in zip(first.modules(), second.modules(), other.modules(), strict=True)
        if isinstance(one, LoraLinear)
    ]
    assert layers
    for one, same, different in layers:
        assert torch.equal(one.lora_A, same.lora_A)
        assert not torch.equal(one.lora_A, different.lora_A)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(SetupError, match="q_proj or k_proj"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), 2)
