"""Each implementation of attention over one slot list against softmax in float64, and a model with one of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from blockrag.modeling.attention import compiled, over_lists, reference
from blockrag.modeling.attention.contract import Attend
from blockrag.modeling.model import SlotModel
from blockrag.modeling.native.kernels import kernels
from tests.models import make_tiny_model
from tests.unit.modeling.test_model import close, compose, stock_logits, tokens

NAMES = {"compiled": compiled.attend, "reference": reference.attend}


def softmax(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float) -> Tensor:
    new, heads, _ = query.shape
    wide = [each[:, :total].double().repeat_interleave(heads // keys.shape[0], dim=0) for each in (keys, values)]
    scores = query.double().transpose(0, 1) @ wide[0].transpose(1, 2) * scaling
    hidden = torch.ones(new, total, dtype=torch.bool).triu_(total - new + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ wide[1]).transpose(0, 1).float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("new", "before", "kv_heads", "group"), [(1, 90, 2, 3), (40, 0, 2, 1), (33, 71, 3, 2)])
def test_every_implementation_keeps_the_contract(
    name: str, dtype: torch.dtype, new: int, before: int, kv_heads: int, group: int
) -> None:
    attend: Attend = NAMES[name]
    total, source = before + new, torch.Generator().manual_seed(0)
    keys, values = (torch.randn(kv_heads, total + 5, 32, generator=source).to(dtype) for _ in range(2))
    query = torch.randn(new, kv_heads * group, 32, generator=source)
    out = torch.full_like(query, 7.0)
    taken = attend(query, keys, values, total, 0.2, out)
    suits = {
        "compiled": dtype == torch.bfloat16 and kernels() is not None,
        "reference": True,
    }
    assert taken is suits[name]
    if taken:
        expected = softmax(query, keys, values, total, 0.2)
        assert float((out - expected).abs().max()) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_the_last_implementation_takes_everything() -> None:
    assert over_lists.IMPLEMENTATIONS[-1] is reference.attend


def test_a_model_takes_another_attention() -> None:
    layers = []

    def watched(module: Any, *given: Any, **options: Any) -> tuple[Tensor, None]:
        layers.append(int(module.layer_idx))
        return over_lists.attention_over_lists(module, *given, **options)

    stock = make_tiny_model("llama")
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), attention=watched)
    layers.clear()
    got = model.forward([(compose(model, [tokens(9, 1)], 5), tokens(5, 2))])[0]
    assert close(got, stock_logits(stock, [tokens(9, 1)], tokens(5, 2))[-1])
    assert layers == [*range(stock.config.num_hidden_layers)] * 2  # the block's pass, then the prompt's
