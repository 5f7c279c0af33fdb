"""Compiled passes over many tokens against the model's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from blockrag.errors import UnsupportedModelError
from blockrag.modeling import long_pass, plain_decoder
from blockrag.modeling.long_pass import LongPass
from blockrag.modeling.model import SlotModel
from blockrag.modeling.native import kernels as native
from blockrag.modeling.native.between_kernel import AttendedSlots, BetweenKernel
from blockrag.modeling.plain_decoder import FAMILIES, UnsuitableError
from blockrag.modeling.rotary import Rotation
from blockrag.modeling.support import inspect_model
from blockrag.types import BlockKV
from tests.models import make_tiny_model
from tests.unit.modeling.test_model import close, tokens
from tests.unit.modeling.test_step import SIZES, with_biases

TOLERANCE = 8e-2
"""Of the rounding to bfloat16 of what is multiplied."""


pytestmark = pytest.mark.usefixtures("compiled")


def pair_of(family: str, **options: Any) -> tuple[SlotModel, SlotModel]:
    """A model with compiled passes, and the same weights in float32 by its own modules."""
    stock = with_biases(make_tiny_model(family, **{**SIZES, **options})).bfloat16()
    reference = SlotModel.from_pretrained_model(copy.deepcopy(stock).float())
    model = SlotModel.from_pretrained_model(stock, kv_dtype="bfloat16")
    assert isinstance(model._long, LongPass)
    assert reference._long is None
    return model, reference


def without_modules(model: SlotModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the compiled pass computes from here on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model's own modules were asked")

    for layer in model.layers:
        monkeypatch.setattr(layer, "forward", refuse)


def numbers(block: BlockKV) -> Tensor:
    parts = [torch.from_numpy(part.copy()) for part in (block.keys, block.values)]
    return torch.stack([part.view(torch.bfloat16) if part.dtype == torch.uint16 else part for part in parts]).float()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_are_what_the_modules_encode(family: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair_of(family)
    without_modules(model, monkeypatch)
    blocks = [tokens(length, length) for length in (1, 37, 2, 150, 64)]
    names = [str(number) for number in range(len(blocks))]
    for got, expected in zip(model.encode(blocks, names), reference.encode(blocks, names), strict=True):
        assert got.key == expected.key
        assert close(numbers(got), numbers(expected), TOLERANCE)


def test_embeddings_are_encoded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair_of("llama")
    ids = tokens(40)
    rows = model.embed_tokens(ids)
    without_modules(model, monkeypatch)
    (got,), (expected,) = model.encode_embeddings([rows], [ids], ["a"]), model.encode([ids], ["a"])
    assert torch.equal(numbers(got), numbers(expected))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prefills_go_on_where_sequences_are(family: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair_of(family)
    without_modules(model, monkeypatch)
    rows = []
    for each in (model, reference):
        resident = [each.to_resident(block) for block in each.encode([tokens(30, 3), tokens(70, 4)], ["a", "b"])]
        states = [each.new_sequence(resident[:count], 400) for count in (2, 0, 1)]
        got = [each.forward([(state, tokens(length, 9)) for state, length in zip(states, (5, 150, 1), strict=True)])]
        got.append(each.forward([(states[1], tokens(140, 5)), (states[0], [7])]))
        rows.append(torch.cat(got))
    assert close(rows[0], rows[1], TOLERANCE)


def test_every_token_is_asked_for() -> None:
    model, reference = pair_of("llama")
    got, expected = (
        each.forward([(each.new_sequence([], 90), tokens(90)), (each.new_sequence([], 9), tokens(9))], every_token=True)
        for each in (model, reference)
    )
    assert got.shape == (99, model.vocab_size)
    assert close(got, expected, TOLERANCE)


def test_traces_are_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair_of("llama")

    def refuse(*_: Any) -> None:
        raise AssertionError("the compiled pass was asked")

    monkeypatch.setattr(model, "_long", refuse)
    with model.traced() as trace:
        model.forward([(model.new_sequence([], 9), tokens(9))])
    assert len(trace) == model.num_layers


def test_sums_that_are_not_suited_are_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair_of("llama")
    monkeypatch.setattr(long_pass, "LARGEST_SUM", 1e-6)  # no sum is between a million and a millionth
    block, expected = model.encode([tokens(50)], ["a"])[0], reference.encode([tokens(50)], ["a"])[0]
    assert close(numbers(block), numbers(expected), TOLERANCE)


def test_beyond_a_window_the_modules_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair_of("mistral", sliding_window=32)
    for length in (20, 100):
        got, expected = (each.forward([(each.new_sequence([], length), tokens(length))]) for each in (model, reference))
        assert close(got, expected, TOLERANCE)
    without_modules(model, monkeypatch)
    model.forward([(model.new_sequence([], 20), tokens(20))])
    with pytest.raises(AssertionError, match="own modules"):
        model.forward([(model.new_sequence([], 100), tokens(100))])


def test_models_of_other_kinds_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rotations = [Rotation(32, (1.0,) * 16)]
    for family, options, reason in (
        ("llama", {"hidden_size": 48, "intermediate_size": 96, "head_dim": 32}, "a width of 48"),
        ("llama", {**SIZES, "hidden_act": "gelu"}, "gelu"),
        ("llama", {**SIZES, "head_dim": 16}, "heads of 16"),
    ):
        model = make_tiny_model(family, **options).bfloat16()
        turned = rotations if options["head_dim"] == 32 else [Rotation(16, (1.0,) * 8)]
        with pytest.raises(UnsuitableError, match=reason):
            LongPass(model, inspect_model(model), turned)
    monkeypatch.setattr(plain_decoder, "kernels", lambda: None)
    assert SlotModel.from_pretrained_model(make_tiny_model("llama", **SIZES).bfloat16())._long is None


def test_a_pass_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of = plain_decoder.PlainDecoder.of

    def wrong(*arguments: Any) -> Any:
        decoder = of(*arguments)
        decoder.layers[1].mlp_norm.mul_(-1)
        return decoder

    monkeypatch.setattr(plain_decoder.PlainDecoder, "of", wrong)
    with pytest.raises(UnsupportedModelError, match="compiled passes"):
        SlotModel.from_pretrained_model(make_tiny_model("llama", **SIZES).bfloat16())


@pytest.fixture
def between() -> BetweenKernel:
    compiled = native.kernels()
    assert compiled is not None
    return BetweenKernel(compiled.compiled, heads=4, kv_heads=2, head_dim=32)


def test_what_the_functions_would_read_wrongly_is_refused(between: BetweenKernel) -> None:
    hidden, narrow = torch.zeros(3, 64), torch.zeros(3, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out"):
        between.add_and_normalise(hidden, None, torch.ones(64), 1e-5, narrow[:2])
    with pytest.raises(ValueError, match="added"):
        between.add_and_normalise(hidden, hidden, torch.ones(64), 1e-5, narrow)
    with pytest.raises(ValueError, match="hidden"):
        between.add_and_normalise(hidden.t(), None, torch.ones(3), 1e-5, narrow)
    with pytest.raises(ValueError, match="a width of 40"):
        between.add_and_normalise(torch.zeros(3, 40), None, torch.ones(40), 1e-5, torch.zeros(3, 40).bfloat16())
    with pytest.raises(ValueError, match="rows"):
        between.gate(narrow, torch.zeros(3, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="inside the MLP"):
        between.gate(torch.zeros(3, 80).bfloat16(), torch.zeros(3, 40).bfloat16())
    with pytest.raises(ValueError, match="phases"):
        projected, kept = torch.zeros(3, 256).bfloat16(), torch.zeros(3, 2, 3, 32).bfloat16()
        between.split_and_rotate(projected, None, torch.zeros(3, 32), 1e-5, torch.zeros(3, 4, 32), *kept)


@pytest.mark.parametrize("heads", [(3, 2, 32), (4, 2, 48), (4, 0, 32), (4, 4, 512)])
def test_heads_that_the_functions_do_not_take(heads: tuple[int, int, int]) -> None:
    compiled = native.kernels()
    assert compiled is not None
    with pytest.raises(ValueError, match="heads"):
        BetweenKernel(compiled.compiled, *heads)


def test_slots_that_are_not_there_are_not_attended_to(between: BetweenKernel) -> None:
    query = torch.zeros(3, 4, 32)
    keys = torch.zeros(2, 5, 32, dtype=torch.bfloat16)
    for segments, reason in (
        ([AttendedSlots(keys, keys, 6, 3)], "of 6 slots of 5"),
        ([AttendedSlots(keys, keys, 2, 3)], "3 tokens of 2"),
        ([AttendedSlots(keys, keys, 3, 2)], "where the segments have 2"),
        ([], "where the segments have 0"),
        ([AttendedSlots(keys.transpose(0, 1), keys, 3, 3)], "keys"),
        ([AttendedSlots(keys, keys[:, ::2], 3, 3)], "values"),
        ([AttendedSlots(keys.float(), keys.float(), 3, 3)], "keys"),
    ):
        with pytest.raises(ValueError, match=reason):
            between.attend(query, segments, 1.0, 1e6, torch.empty_like(query), torch.empty(3, 4, 32).bfloat16())
