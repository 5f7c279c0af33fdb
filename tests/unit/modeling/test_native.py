"""Compiled kernels against what they stand for: written in torch, in float32."""

from __future__ import annotations

import copy
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockrag.modeling import attention, slots
from blockrag.modeling.model import SlotModel
from blockrag.modeling.native import build
from blockrag.modeling.native import kernels as native
from blockrag.modeling.native.kernels import Kernels
from blockrag.modeling.rotary import RotaryTable, rotate_into
from blockrag.modeling.slots import ResidentBlock, Slots, SlotSlice
from tests.models import FAMILIES, make_tiny_model
from tests.unit.modeling.test_model import close, compose, stock_logits, tokens

COMPILED = native.kernels()
LIMIT = 2.0**90
LOG2_E = 1.4426950408889634
needs_kernels = pytest.mark.skipif(COMPILED is None, reason="no compiled kernels on this machine")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(native, "_WORTH_THREADS", 0)
    yield request.param
    torch.set_num_threads(before)


def reference(query: Tensor, keys: Tensor, values: Tensor, total: int, scaling: float) -> Tensor:
    """Softmax over what each token sees, in float64; arguments as of ``attend``."""
    new, heads, _ = query.shape
    group = heads // keys.shape[0]
    wide = [states[:, :total].double().repeat_interleave(group, dim=0) for states in (keys, values)]
    scores = query.double().transpose(0, 1) @ wide[0].transpose(1, 2) * scaling
    hidden = torch.ones(new, total, dtype=torch.bool).triu_(total - new + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ wide[1]).transpose(0, 1).float()


def random_slots(kv_heads: int, count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(kv_heads, count, width, generator=source).bfloat16() for _ in range(2))
    return keys, values


@needs_kernels
@pytest.mark.parametrize(("width", "kv_heads", "group"), [(32, 4, 2), (64, 1, 1), (96, 2, 7), (128, 3, 1), (256, 1, 8)])
@pytest.mark.parametrize(("new", "before"), [(1, 0), (1, 300), (50, 0), (5, 64), (130, 63)])
def test_attention(new: int, before: int, kv_heads: int, group: int, width: int, threads: int) -> None:
    assert COMPILED is not None
    total = before + new
    keys, values = random_slots(kv_heads, total + 9, width)
    query = torch.randn(new, kv_heads * group, width, generator=torch.Generator().manual_seed(1))
    out = torch.full_like(query, 7.0)
    scaling = width**-0.5
    assert COMPILED.attend(query, keys, values, total, scaling * LOG2_E, LIMIT, out)
    expected = reference(query, keys, values, total, scaling)
    assert float((out - expected).abs().max()) < 1e-2 * float(expected.abs().max())


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(new=st.integers(1, 140), before=st.integers(0, 200), spare=st.integers(0, 70), seed=st.integers(0, 9))
def test_attention_to_any_number_of_slots(new: int, before: int, spare: int, seed: int) -> None:
    """Whatever finite numbers stand in the slots beyond."""
    assert COMPILED is not None
    total = before + new
    keys, values = random_slots(2, total + spare, 32, seed)
    keys[:, total:], values[:, total:] = 3e4, -3e4
    query = torch.randn(new, 4, 32, generator=torch.Generator().manual_seed(seed))
    out = torch.empty_like(query)
    assert COMPILED.attend(query, keys, values, total, 0.2 * LOG2_E, LIMIT, out)
    expected = reference(query, keys, values, total, 0.2)
    assert float((out - expected).abs().max()) < 1e-2 * float(expected.abs().max())


@needs_kernels
@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_sums_out_of_range_are_told_and_computed_otherwise(factor: float) -> None:
    assert COMPILED is not None
    keys, values = random_slots(2, 90, 32)
    keys[..., 0] = 1.0
    query = torch.zeros(20, 4, 32)
    query[..., 0] = 1.0
    query[7, 3, 0] = factor
    out = torch.empty_like(query)
    assert not COMPILED.attend(query, keys, values, 90, LOG2_E, LIMIT, out)
    attention.attend(query, keys, values, 90, 1.0, out)
    expected = reference(query, keys, values, 90, 1.0)
    assert float((out - expected).abs().max()) < 1e-2 * float(expected.abs().max())


@needs_kernels
def test_not_a_number_is_told() -> None:
    assert COMPILED is not None
    keys, values = random_slots(1, 40, 32)
    query = torch.randn(4, 1, 32)
    query[2, 0, 5] = float("nan")
    assert not COMPILED.attend(query, keys, values, 40, 0.2, LIMIT, torch.empty_like(query))


def made_blocks(lengths: list[int], width: int = 32) -> list[ResidentBlock]:
    source = torch.Generator().manual_seed(5)
    return [
        ResidentBlock(str(number), torch.randn(2, 3, 2, length, width, generator=source).bfloat16())
        for number, length in enumerate(lengths)
    ]


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.sampled_from([32, 64]), spare=st.integers(0, 5), scaling=st.sampled_from([1.0, 1.2]))
def test_placing(data: st.DataObject, width: int, spare: int, scaling: float) -> None:
    """Blocks and slices of blocks; nothing beyond them is touched."""
    assert COMPILED is not None
    blocks = made_blocks(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)), width)
    chosen: list[Slots] = []
    for block in data.draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=8)):
        start = data.draw(st.integers(0, block.num_slots - 1))
        stop = data.draw(st.integers(start + 1, block.num_slots))
        chosen.append(block if data.draw(st.booleans()) else SlotSlice(block, start, stop))
    whole = sum(block.num_slots for block in chosen)
    rotary = RotaryTable(10000.0 ** -(torch.arange(0, width, 2) / width), scaling, 512, torch.device("cpu"))
    phases = rotary.phases(whole)[:whole]
    out = torch.full((2, 3, 2, whole + spare, width), 9.0, dtype=torch.bfloat16)
    COMPILED.place([block.piece for block in chosen], phases, out)
    joined = torch.cat([block.slots for block in chosen], dim=3)
    expected = torch.empty(joined[0].shape)
    rotate_into(expected, joined[0].float(), phases)
    placed = out[..., :whole, :]
    assert torch.equal(placed[1], joined[1])
    # rounded to bfloat16 once: half of the last of eight bits, and what float32 leaves open
    assert bool(((placed[0].float() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all())
    assert bool((out[..., whole:, :] == 9.0).all())


@needs_kernels
def test_placing_refuses_what_does_not_fit() -> None:
    assert COMPILED is not None
    (block,) = made_blocks([10])
    phases = torch.ones(10, 16, dtype=torch.complex64)
    for room, known in ((9, phases), (10, phases[:9]), (10, phases.repeat(1, 2)[:, :16])):
        with pytest.raises(ValueError, match="10 slots"):
            COMPILED.place([block.piece], known, torch.empty(2, 3, 2, room, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_and_without_kernels(family: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed prompts, then steps of several sequences in one pass, against the explicit mask."""
    calls = []
    if compiled:
        assert COMPILED is not None
        for name in ("attend", "place"):
            original = getattr(COMPILED, name)
            counted = lambda *given, name=name, original=original: calls.append(name) or original(*given)  # noqa: E731
            monkeypatch.setattr(COMPILED, name, counted)
    else:
        for module in (attention, slots):
            monkeypatch.setattr(module, "kernels", lambda: None)
    stock = make_tiny_model(family, head_dim=32, hidden_size=128, initializer_range=0.1)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype="bfloat16")
    blocks = [tokens(1), tokens(150, 1), tokens(33, 2)]
    first, second = compose(model, blocks, 40), compose(model, blocks[1:], 40)
    expected = [stock_logits(stock, blocks, tokens(30, 3))[-1], stock_logits(stock, blocks[1:], tokens(9, 4))[-1]]
    for got, wanted in zip(model.forward([(first, tokens(30, 3)), (second, tokens(9, 4))]), expected, strict=True):
        assert close(got, wanted, 3e-2)
    got = model.forward([(second, [5]), (first, [6, 7])])
    assert close(got[0], stock_logits(stock, blocks[1:], [*tokens(9, 4), 5])[-1], 3e-2)
    assert close(got[1], stock_logits(stock, blocks, [*tokens(30, 3), 6, 7])[-1], 3e-2)
    assert set(calls) == ({"attend", "place"} if compiled else set())


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"size": (2, 5, 40)}, False),
        ({"size": (2, 5, 288)}, False),
        ({"device": "meta"}, False),
    ],
)
def test_which_slots_are_taken(kind: dict[str, Any], taken: bool) -> None:
    assert Kernels.take(torch.empty(**{"size": (2, 5, 32), "dtype": torch.bfloat16, **kind})) is taken


def test_slots_that_are_not_packed_are_not_taken() -> None:
    fresh = torch.empty(5, 2, 32, dtype=torch.bfloat16).transpose(0, 1)
    assert not Kernels.take(fresh)


@needs_kernels
def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "package", tmp_path / "cache"
    path = build.library((first, second))
    assert path.parent == second
    assert [entry.name for entry in second.iterdir()] == [path.name]
    monkeypatch.setattr(build, "build", lambda path: pytest.fail("built again"))
    assert build.library((second, first)) == build.library((first, second)) == path
    assert Kernels(str(path)).attend(
        torch.ones(1, 1, 32), *random_slots(1, 1, 32), 1, 0.1, LIMIT, torch.empty(1, 1, 32)
    )


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("", "no C compiler"), ("false", "false failed"), ("/nowhere/cc", "/nowhere/cc")],
)
def test_without_a_compiler_that_works(
    compiler: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuildError, match=message):
        build.library((tmp_path / "cache",))
    assert not list(tmp_path.glob("cache/*"))


def test_other_processors_do_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    native.kernels.cache_clear()
    with caplog.at_level(logging.INFO):
        assert native.kernels() is None
    assert "this is riscv64" in caplog.text
    native.kernels.cache_clear()
    monkeypatch.undo()
    assert (native.kernels() is None) == (COMPILED is None)
