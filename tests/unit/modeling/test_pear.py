from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from blockrag.errors import BundleError, UnsupportedModelError
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.bundle_writing import write_pear
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.pear import attention_heads, fold
from blockrag.modeling.pear_record import HeadCoefficient, PearRecord, ProxyScore
from blockrag.modeling.verify import verify_bundle
from tests.models import make_tiny_bundle
from tests.unit.training.pear.models import KINDS, make_model

COEFFICIENTS = (
    HeadCoefficient(layer=0, head=1, tau=0.25, delta_pi=0.2),
    HeadCoefficient(layer=1, head=0, tau=-0.5, delta_pi=0.1),
    HeadCoefficient(layer=1, head=3, tau=1.75, delta_pi=0.05),
)
RECORD = PearRecord(
    heads=COEFFICIENTS,
    mask="block",
    mean="batch",
    later_heads="frozen",
    sizes=((4, 6), (2, 3)),
    distractors=2,
    n=6,
    steps=3,
    batch=2,
    learning_rate=5e-3,
    seed=7,
    before={"full": ProxyScore(3.0, 0.1), "block": ProxyScore(3.5, 0.05)},
    after={"full": ProxyScore(2.0, 0.3), "block": ProxyScore(2.5, 0.2)},
)
TOKENS = torch.arange(3, 33).view(2, 15)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_equals_scaling_the_heads_outputs(kind: str) -> None:
    model = make_model(kind)
    with scaled_after_projection(model, COEFFICIENTS):
        expected = logits(model)
    plain = logits(model)
    fold(model, COEFFICIENTS)

    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_folding_adds_no_parameter_and_no_operation(kind: str) -> None:
    model = make_model(kind)
    folded = copy.deepcopy(model)
    fold(folded, COEFFICIENTS)

    assert described(folded) == described(model)
    assert operations(folded) == operations(model)


def test_folding_in_bfloat16_rounds_once() -> None:
    model = make_model("llama").to(torch.bfloat16)
    heads = attention_heads(model)
    expected = (heads.columns(0, 1).float() * COEFFICIENTS[0].tau).bfloat16()
    fold(model, COEFFICIENTS)

    assert torch.equal(heads.columns(0, 1), expected)


def test_grouped_queries_have_columns_of_their_own() -> None:
    heads = attention_heads(make_model("llama"))

    assert (heads.num_heads, heads.head_dim, heads.count) == (4, 8, 8)
    assert heads.columns(1, 3).shape == (32, 8)


def test_names_a_head_that_the_model_lacks() -> None:
    with pytest.raises(BundleError, match=r"head 0\.9, where the model has 2 layers of 4 heads"):
        fold(make_model("llama"), [HeadCoefficient(0, 9, 0.5, 0.1)])


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2)), "with attention"),
        (lambda: T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, num_layers=1)), "decoder-only"),
    ],
)
def test_names_what_a_model_lacks(model: Callable[[], PreTrainedModel], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        attention_heads(model())


class TestBundle:
    @pytest.fixture
    def plain(self, tmp_path: Path) -> Path:
        return make_tiny_bundle(tmp_path / "plain")

    @pytest.fixture
    def folded(self, plain: Path, tmp_path: Path) -> Path:
        return write_pear(load_bundle(plain), RECORD, tmp_path / "folded").path

    def test_the_record_comes_back(self, plain: Path, folded: Path) -> None:
        assert load_bundle(folded).pear == RECORD
        assert load_bundle(plain).pear is None

    def test_every_loader_folds(self, plain: Path, folded: Path) -> None:
        expected = load_stock_model(load_bundle(plain))
        fold(expected, COEFFICIENTS)
        tokens = list(range(5, 14))
        with torch.no_grad():
            wanted = expected(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            stock = load_stock_model(load_bundle(folded))(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        model = SlotModel.load(load_bundle(folded))
        served = model.forward([(model.new_sequence([], len(tokens)), tokens)])[0]

        assert torch.equal(stock, wanted)
        torch.testing.assert_close(served, wanted, atol=1e-4, rtol=1e-4)

    def test_verifies(self, folded: Path) -> None:
        assert verify_bundle(folded).passed

    def test_verify_would_see_coefficients_folded_on_one_side_only(self, folded: Path) -> None:
        bundle = load_bundle(folded)
        unfolded = SlotModel.load(replace(bundle, pear=None))
        block = SlotModel.load(bundle).encode([[5, 6, 7]], ["k"])[0]

        assert abs(unfolded.encode([[5, 6, 7]], ["k"])[0].keys[1:] - block.keys[1:]).max() > 1e-2

    def test_the_fingerprint_counts_the_coefficients_alone(self, plain: Path, folded: Path) -> None:
        bundle = load_bundle(folded)
        changed = replace(RECORD, heads=(replace(COEFFICIENTS[0], tau=0.26), *COEFFICIENTS[1:]))
        learned_again = replace(RECORD, steps=9, heads=COEFFICIENTS[::-1])

        assert bundle.fingerprint != load_bundle(plain).fingerprint
        assert replace(bundle, pear=changed).fingerprint != bundle.fingerprint
        assert replace(bundle, pear=learned_again).fingerprint == bundle.fingerprint

    def test_what_was_measured_before_does_not_count_for_it(self, plain: Path, folded: Path) -> None:
        manifest = json.loads((plain / "manifest.json").read_text(encoding="utf-8"))
        manifest["quality"] = {"scores": 1}
        (plain / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        again = write_pear(load_bundle(plain), RECORD, None)

        assert again.quality == {}
        assert again.path == plain and again.fingerprint == load_bundle(folded).fingerprint

    def test_the_model_card_describes_the_last_coefficients(self, folded: Path) -> None:
        card = folded / "MODEL_CARD.md"
        card.write_text("# Tiny\n\n" + card.read_text(encoding="utf-8"), encoding="utf-8")
        write_pear(load_bundle(folded), replace(RECORD, heads=COEFFICIENTS[:1]), None)

        text = card.read_text(encoding="utf-8")
        assert text.startswith("# Tiny\n\n## Re-weighted heads (PEAR)\n")
        assert text.count("## Re-weighted") == 1
        assert "| 0 | 1 | 0.250 | +20.0% |" in text
        assert "| 1 | 0 |" not in text

    def test_does_not_overwrite(self, plain: Path, folded: Path) -> None:
        with pytest.raises(BundleError, match="exists already"):
            write_pear(load_bundle(plain), RECORD, folded)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda pear: pear.pop("mask"), "wrong keys: mask"),
            (lambda pear: pear.update(mask="half"), "mask 'half'"),
            (lambda pear: pear.update(heads=[]), "heads must be named"),
            (lambda pear: pear["heads"].append(pear["heads"][0]), "each once"),
            (lambda pear: pear["heads"][0].pop("tau"), "tau"),
            (lambda pear: pear["heads"][0].update(tau=float("nan")), r"head 0\.1 with coefficient nan"),
            (lambda pear: pear["heads"][0].update(layer=-1), r"head -1\.1"),
            (lambda pear: pear["heads"][0].update(layer=8), r"head 8\.1, where the model has 3 layers"),
        ],
    )
    def test_refuses_a_wrong_record(self, folded: Path, change: Callable[[Any], Any], problem: str) -> None:
        path = folded / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest["pear"])
        path.write_text(json.dumps(manifest), encoding="utf-8")

        with pytest.raises(BundleError, match=problem):
            SlotModel.load(load_bundle(folded))


@contextmanager
def scaled_after_projection(model: PreTrainedModel, coefficients: tuple[HeadCoefficient, ...]) -> Iterator[None]:
    """Adds (τ - 1) W_O,h z_h to each chosen head's layer: the definition, on the far side of the projection."""
    heads = attention_heads(model)

    def hook(layer: int) -> Callable[..., Tensor]:
        def scale(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            bias = module.forward(torch.zeros_like(inputs[0]))
            for item in coefficients:
                if item.layer == layer:
                    span = slice(item.head * heads.head_dim, (item.head + 1) * heads.head_dim)
                    alone = torch.zeros_like(inputs[0])
                    alone[..., span] = inputs[0][..., span]
                    output = output + (item.tau - 1) * (module.forward(alone) - bias)
            return output

        return scale

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(heads.outputs)]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model(TOKENS, use_cache=False).logits
    return result


def described(model: nn.Module) -> list[tuple[str, str]]:
    def parts() -> Iterator[tuple[str, str]]:
        for name, module in model.named_modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            yield name, f"{type(module).__name__} {hooks}"
        for name, parameter in model.named_parameters():
            yield name, f"{list(parameter.shape)} {parameter.dtype} {parameter.stride()}"

    return list(parts())


def operations(model: PreTrainedModel) -> list[str]:
    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Counter():
        logits(model)
    assert len(names) > 20
    return names
