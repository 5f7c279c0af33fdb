"""The compiled step against the model itself with the weights that the step stands for."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling import plain_decoder
from blockrag.modeling import step as stepping
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.native import kernels as native
from blockrag.modeling.native.step_kernel import PackedProduct, StepKernel, StepSegment, interleaved
from blockrag.modeling.rotary import Rotation
from blockrag.modeling.slots import SequenceState
from blockrag.modeling.step import MOST_TOKENS, MOST_TOKENS_WITH_TILES, UnsuitableError
from blockrag.modeling.support import inspect_model
from tests.models import FAMILIES, make_tiny_bundle, make_tiny_model
from tests.unit.modeling.test_model import close, compose, stock_logits, tokens

SIZES: dict[str, Any] = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}
TOLERANCE = 8e-2
"""Of the rounding to bfloat16 of what is multiplied, and of blocks; eight bits themselves are in the reference too."""


pytestmark = pytest.mark.usefixtures("compiled")


def rounded_(model: PreTrainedModel) -> PreTrainedModel:
    """The same with the weights that a step stands for: float32, each group of whole steps."""
    model = copy.deepcopy(model).float()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(unpacked(PackedProduct.pack(module.weight.detach())))
    return model


def unpacked(product: PackedProduct) -> Tensor:
    """The weights that it stands for, float32 [rows, inputs]."""
    groups = product.weights.shape[1]
    scales = product.weights[:, :, 0].contiguous().view(torch.bfloat16).transpose(1, 2).reshape(-1, groups, 1)
    lines = product.weights[:, :, 1:].reshape(-1, groups, 16, 2, 2, 16).permute(0, 3, 5, 1, 2, 4)
    return (lines.reshape(-1, groups, 32).float() * scales.float()).view(-1, product.inputs)[: product.rows]


def served(model: PreTrainedModel) -> SlotModel:
    slots = SlotModel.from_pretrained_model(copy.deepcopy(model).bfloat16(), kv_dtype="bfloat16")
    assert slots.quantise_steps()
    assert slots.weights == "int8"
    return slots


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    source = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=source))
    return model


def test_packed_weights_are_the_nearest_steps_of_each_group() -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[5, 40] = 100.0  # costs the inputs beside it their precision, and no other's
    product = PackedProduct.pack(weight)
    assert (product.rows, product.inputs) == (70, 96)
    largest = weight.view(70, 3, 32).abs().amax(2, keepdim=True)
    error = (unpacked(product) - weight).abs().view(70, 3, 32)
    assert bool((error <= largest / 127 * 0.503).all())  # scales are rounded to bfloat16
    assert product.weights.nbytes == 96 * 96 + 96 * 3 * 2


def test_gate_and_up_take_turns() -> None:
    gate, up = torch.arange(64.0).view(32, 2), -torch.arange(64.0).view(32, 2)
    mixed = interleaved(gate, up)
    assert torch.equal(mixed[:16], gate[:16])
    assert torch.equal(mixed[16:32], up[:16])
    assert torch.equal(mixed[48:], up[16:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [[1], [8], [1, 1, 1], [5, 1, 9], [150, 3]])
def test_a_step_is_the_model_with_rounded_weights(
    family: str, counts: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = with_biases(make_tiny_model(family, tie_word_embeddings=family != "mistral", **SIZES)).bfloat16().float()
    reference = rounded_(stock)
    model = served(stock)
    blocks = [tokens(1), tokens(37, 1), tokens(60, 2)]
    states = [compose(model, blocks[: 1 + number % 3], count + 1) for number, count in enumerate(counts)]
    finals = [tokens(count, 7 + number) for number, count in enumerate(counts)]
    for length in (None, 1):  # a step, and one behind what it wrote
        asked = finals if length is None else [[9] for _ in finals]
        with monkeypatch.context() as only:
            only.setattr(model, "_model", None)  # nothing but the step computes
            got = model.forward(list(zip(states, asked, strict=True)))
        if length is None:
            kept, first = got, got.clone()
        assert torch.equal(kept, first)  # whatever later steps computed
        for number, row in enumerate(got):
            whole = finals[number] + ([] if length is None else [9])
            # blocks are encoded with the weights themselves, as in the reference's masked pass they are not
            expected = reference_logits(stock, reference, blocks[: 1 + number % 3], whole)
            assert close(row, expected, TOLERANCE)


def reference_logits(
    stock: PreTrainedModel, rounded: PreTrainedModel, blocks: list[list[int]], final: list[int]
) -> Tensor:
    """Blocks by the whole weights, the final block by the rounded ones, in float32."""
    encoding = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    reading = SlotModel.from_pretrained_model(copy.deepcopy(rounded))
    encoded = encoding.encode(blocks, [str(number) for number in range(len(blocks))])
    state = reading.new_sequence([reading.to_resident(block) for block in encoded], len(final))
    return reading.forward([(state, final)])[0]


@pytest.mark.parametrize("count", [2, 4, 7, 13])
def test_what_else_is_in_a_step_changes_no_bit(count: int) -> None:
    """An answer must not depend on who else is asking."""
    model = served(make_tiny_model("llama", **SIZES))
    prompts = [tokens(1 + 4 * (number % 6), number) for number in range(count)]

    def states() -> list[SequenceState]:
        return [compose(model, [tokens(20, 50 + number)], 40) for number in range(count)]

    alone = []
    for state, prompt in zip(states(), prompts, strict=True):
        alone += [[model.forward([(state, prompt)])[0], model.forward([(state, [9])])[0]]]
    together = states()
    first = model.forward(list(zip(together, prompts, strict=True)))
    second = model.forward([(state, [9]) for state in together])
    for number in range(count):
        assert torch.equal(first[number], alone[number][0])
        assert torch.equal(second[number], alone[number][1])


def test_hidden_states_are_traced() -> None:
    stock = make_tiny_model("llama", **SIZES)
    model, reference = served(stock), SlotModel.from_pretrained_model(rounded_(stock))
    traces = []
    for each in (model, reference):
        with each.traced() as trace:
            each.forward([(each.new_sequence([], 9), tokens(9))])
        traces.append(trace)
    assert len(traces[0]) == len(traces[1]) == model.num_layers
    for got, expected in zip(traces[0][:-1], traces[1][:-1], strict=True):
        assert close(got, expected, TOLERANCE)
    assert close(traces[0][-1][-1], traces[1][-1][-1], TOLERANCE)


def test_longer_inputs_and_blocks_are_computed_with_the_whole_weights() -> None:
    stock = make_tiny_model("llama", **SIZES)
    model = served(stock)
    plain = SlotModel.from_pretrained_model(copy.deepcopy(stock).bfloat16(), kv_dtype="bfloat16")
    asked = tokens(MOST_TOKENS + 1)
    got, expected = (each.forward([(each.new_sequence([], len(asked)), asked)]) for each in (model, plain))
    assert torch.equal(got, expected)
    got, expected = (each.forward([(each.new_sequence([], len(asked)), asked[1:])]) for each in (model, plain))
    assert not torch.equal(got, expected)
    for ours, theirs in zip(*(each.encode([tokens(9)], ["k"]) for each in (model, plain)), strict=True):
        assert (ours.keys == theirs.keys).all()
        assert (ours.values == theirs.values).all()


def test_scores_out_of_range_are_computed_by_the_model() -> None:
    stock = make_tiny_model("llama", **SIZES)
    for layer in stock.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.k_proj.weight.data *= 40
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock).bfloat16(), kv_dtype="bfloat16")
    asked = tokens(12)
    expected = model.forward([(model.new_sequence([], 12), asked)])
    model._step = stepping.Step(model._model, model._facts, model.rotary.rotations)
    assert torch.equal(model.forward([(model.new_sequence([], 12), asked)]), expected)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "bias"),
        ({"intermediate_size": 80}, "multiple of 32"),
        ({"head_dim": 16}, "heads of 16"),
        ({"hidden_size": 48}, "48 inputs"),
    ],
)
def test_another_kind_of_model_is_left_alone(
    changed: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock = make_tiny_model("llama", **{**SIZES, **changed}).bfloat16()
    model = SlotModel.from_pretrained_model(stock, kv_dtype="bfloat16")
    with caplog.at_level(logging.INFO):
        assert not model.quantise_steps()
    assert reason in caplog.text
    assert model.weights == "none"
    assert model.forward([(model.new_sequence([], 4), tokens(4))]).isfinite().all()
    with pytest.raises(UnsupportedModelError, match=reason):
        model.quantise_steps(required=True)


def test_float32_and_machines_without_kernels_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not SlotModel.from_pretrained_model(make_tiny_model("llama", **SIZES)).quantise_steps()
    monkeypatch.setattr(plain_decoder, "kernels", lambda: None)
    model = make_tiny_model("llama", **SIZES).bfloat16()
    with pytest.raises(UnsuitableError, match="no compiled kernels"):
        stepping.Step(model, inspect_model(model), [Rotation(32, (1.0,) * 16)])


def test_a_step_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SlotModel.from_pretrained_model(make_tiny_model("llama", **SIZES).bfloat16(), kv_dtype="bfloat16")
    packed = stepping.pack

    def wrong(*arguments: Any) -> Any:
        decoder = packed(*arguments)
        decoder.plain.layers[1].mlp_norm.mul_(-1)
        return decoder

    monkeypatch.setattr(stepping, "pack", wrong)
    with pytest.raises(UnsupportedModelError, match="in eight bits"):
        model.quantise_steps()


def test_what_the_function_would_read_wrongly_is_refused() -> None:
    stock = make_tiny_model("llama", **SIZES).bfloat16()
    decoder = stepping.pack(stock, inspect_model(stock))
    library = native.kernels()
    assert library is not None
    kernel = StepKernel(library.compiled, decoder, 2.0**90)
    slots = torch.zeros(2, 3, 2, 10, 32, dtype=torch.bfloat16)
    phases, hidden = torch.ones(2, 16, dtype=torch.complex64), torch.ones(2, 64)
    right = StepSegment(slots, 8, 2)
    assert kernel.step(hidden.clone(), phases, [right]) is not None
    for given in (
        (hidden, phases, [StepSegment(slots, 9, 2)]),
        (hidden, phases, [StepSegment(slots, -1, 2)]),
        (hidden, phases, [StepSegment(slots, 0, 1)]),
        (hidden, phases, []),
        (hidden, phases, [StepSegment(slots.float(), 0, 2)]),
        (hidden, phases, [StepSegment(slots[:, :2], 0, 2)]),
        (hidden, phases, [StepSegment(slots[:, :, :, ::2], 0, 2)]),
        (hidden.double(), phases, [right]),
        (hidden[:, ::2], phases, [right]),
        (hidden, phases[:1], [right]),
        (hidden, phases.to(torch.complex128), [right]),
        (hidden, phases, [right], torch.empty(2, 2, 64)),
    ):
        with pytest.raises(ValueError):
            kernel.step(*given)


def test_tiles_and_wide_models_have_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = make_tiny_model("llama", **{**SIZES, "intermediate_size": 16384, "num_hidden_layers": 1}).bfloat16()
    assert stepping.Step(stock, inspect_model(stock), [Rotation(32, (1.0,) * 16)]).most_tokens == 48
    monkeypatch.setattr(stepping, "has_instructions", lambda names: names == ("amx_bf16",))
    assert stepping.Step(stock, inspect_model(stock), [Rotation(32, (1.0,) * 16)]).most_tokens == MOST_TOKENS_WITH_TILES


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does not multiply it; the kernels stay those of this one."""
    monkeypatch.setattr(stepping, "has_instructions", lambda names: False)


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("counts", [[1], [5, 1, 9]])
def test_models_in_float32_have_steps_where_bfloat16_is_not_multiplied(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = make_tiny_model("llama", **SIZES)
    reference = rounded_(stock)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype="bfloat16")
    assert model.compute_dtype == torch.float32
    assert model._long is None
    assert model.quantise_steps(required=True)
    blocks = [tokens(37, 1), tokens(60, 2)]
    states = [compose(model, blocks[: 1 + number % 2], count) for number, count in enumerate(counts)]
    finals = [tokens(count, 7 + number) for number, count in enumerate(counts)]
    monkeypatch.setattr(model, "_model", None)
    for number, row in enumerate(model.forward(list(zip(states, finals, strict=True)))):
        expected = reference_logits(stock, reference, blocks[: 1 + number % 2], finals[number])
        assert close(row, expected, TOLERANCE)


@pytest.mark.usefixtures("without_bfloat16")
def test_slots_of_float32_have_no_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not SlotModel.from_pretrained_model(make_tiny_model("llama", **SIZES)).quantise_steps()
    assert "its slots are torch.float32" in caplog.text


def test_stock_logits_are_near() -> None:
    """The whole: eight bits, bfloat16 and slots against transformers in float32."""
    stock = make_tiny_model("llama", **SIZES)
    model = served(stock)
    blocks, final = [tokens(1), tokens(30, 1)], tokens(10, 3)
    got = model.forward([(compose(model, blocks, 10), final)])[0]
    assert close(got, stock_logits(stock, blocks, final)[-1], 0.1)


@pytest.mark.parametrize(
    ("weights", "compute", "found"),
    [
        ("auto", "bfloat16", "int8"),
        ("auto", "float32", "int8 without bfloat16"),
        ("none", "bfloat16", "none"),
        ("int8", "bfloat16", "int8"),
    ],
)
def test_which_weights_steps_read(weights: str, compute: str, found: str, tmp_path: Path) -> None:
    if found == "int8 without bfloat16":
        found = "int8" if torch.float32 in stepping.stepped_dtypes() else "none"
    made = make_tiny_bundle(tmp_path / "bundle", **SIZES)
    bundle = load_bundle(made, compute_dtype=compute, kv_dtype="bfloat16", weights=weights)
    assert SlotModel.load(bundle).weights == found
    assert SlotModel.load(bundle, weights="none").weights == "none"


def test_eight_bits_or_an_error(tmp_path: Path) -> None:
    bundle = load_bundle(make_tiny_bundle(tmp_path / "bundle", **SIZES), weights="int8")
    with pytest.raises(UnsupportedModelError, match=r"computes in torch\.float32"):
        SlotModel.load(bundle)
