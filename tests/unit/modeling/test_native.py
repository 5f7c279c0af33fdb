"""Compiled kernels against what they stand for: written in torch, in float32."""

from __future__ import annotations

import copy
import ctypes
import itertools
import logging
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockrag.modeling import slots
from blockrag.modeling.attention import compiled as compiled_attention
from blockrag.modeling.attention.over_lists import attend
from blockrag.modeling.model import SlotModel
from blockrag.modeling.native import build
from blockrag.modeling.native import kernels as native
from blockrag.modeling.native.kernels import Kernels
from blockrag.modeling.rotary import Rotation, rotate_into
from blockrag.modeling.slots import ResidentBlock, Slots, SlotSlice, quantised, widened
from tests.models import FAMILIES, make_tiny_model
from tests.unit.modeling.test_model import close, compose, stock_logits, tokens

LIMIT = 2.0**90
LOG2_E = 1.4426950408889634


def kernels_here() -> Kernels:
    library = native.kernels()
    return library if library is not None else pytest.skip("no compiled kernels on this machine")


def at(pointer: int, kind: torch.dtype, count: int) -> Tensor:
    """The numbers that a pointer points to."""
    return torch.frombuffer((ctypes.c_char * (count * kind.itemsize)).from_address(pointer), dtype=kind)


class _Function:
    """A Python function where ctypes has a foreign one, whose types may be declared."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)


class LibraryInTorch:
    """The functions of slots.c, from the same pointers: what the tests run where the instructions are missing."""

    def __init__(self) -> None:
        self.attend, self.place_slots = _Function(self._attend), _Function(self._place)

    def _attend(self, query: int, keys: int, values: int, *numbers: Any) -> int:
        tokens, heads, kv_heads, width, total, plane, scale, least, most, _, out = numbers
        group = heads // kv_heads
        rows = at(query, torch.float32, tokens * heads * width).view(tokens, heads, width).transpose(0, 1).double()
        span = (kv_heads - 1) * plane + total * width
        held = [at(each, torch.bfloat16, span).double() for each in (keys, values)]
        wide = [
            each.as_strided((kv_heads, total, width), (plane, width, 1)).repeat_interleave(group, dim=0)
            for each in held
        ]
        scores = rows @ wide[0].transpose(1, 2) * scale
        hidden = torch.ones(tokens, total, dtype=torch.bool).triu_(total - tokens + 1)
        weights = torch.exp2(scores.masked_fill(hidden, float("-inf")))
        sums = weights.sum(-1, keepdim=True)
        written = at(out, torch.float32, tokens * heads * width).view(tokens, heads, width)
        written.copy_((weights @ wide[1] / sums).transpose(0, 1))
        return int((~((sums > least) & (sums < most))).sum())

    def _place(self, blocks: int, sources: Any, source_planes: Any, of_keys: Any, of_values: Any, *rest: Any) -> None:
        starts, key_planes, width, phases, _, out, out_plane = rest
        turns = at(phases, torch.complex64, starts[blocks] * width // 2).view(-1, width // 2)
        for block, plane in itertools.product(range(blocks), range(2 * key_planes)):
            start, stop = starts[block], starts[block + 1]
            count = (stop - start) * width
            if not count:
                continue
            if of_keys[block]:
                narrow = at(sources[block] + plane * source_planes[block], torch.int8, count).view(-1, width).float()
                if plane < key_planes:
                    scales = at(of_keys[block], torch.bfloat16, 2 * key_planes * width).view(2, key_planes, width)
                    placed = narrow * scales[0, plane].float() + scales[1, plane].float()
                else:
                    first = 2 * (plane - key_planes) * (source_planes[block] // width)
                    placed = narrow * at(of_values[block] + first, torch.bfloat16, stop - start).float()[:, None]
            else:
                placed = at(sources[block] + 2 * plane * source_planes[block], torch.bfloat16, count).view(-1, width)
            if plane < key_planes:
                rotated = torch.empty(placed.shape)
                rotate_into(rotated, placed.float(), turns[start:stop])
                placed = rotated
            at(out + 2 * (plane * out_plane + start * width), torch.bfloat16, count).view(-1, width).copy_(placed)


@pytest.fixture(scope="module", params=[*(target.name for target in build.TARGETS), "in torch"])
def compiled(request: pytest.FixtureRequest) -> Kernels:
    """Kernels for each kind of processor that this one is, not only the fastest, and the reference in their place: the
    tests hold what all do, and themselves on any machine."""
    if request.param == "in torch":
        return Kernels(LibraryInTorch())
    kernels_here()
    target = next(target for target in build.TARGETS if target.name == request.param)
    if target not in build.runnable():
        pytest.skip(f"the processor has no {target.name}")
    return Kernels.load(build.library(target))


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


@pytest.mark.parametrize(("width", "kv_heads", "group"), [(32, 4, 2), (64, 1, 1), (96, 2, 7), (128, 3, 1), (256, 1, 8)])
@pytest.mark.parametrize(("new", "before"), [(1, 0), (1, 300), (50, 0), (5, 64), (130, 63)])
def test_attention(
    new: int, before: int, kv_heads: int, group: int, width: int, threads: int, compiled: Kernels
) -> None:
    total = before + new
    keys, values = random_slots(kv_heads, total + 9, width)
    query = torch.randn(new, kv_heads * group, width, generator=torch.Generator().manual_seed(1))
    out = torch.full_like(query, 7.0)
    scaling = width**-0.5
    assert compiled.attend(query, keys, values, total, scaling * LOG2_E, LIMIT, out)
    expected = reference(query, keys, values, total, scaling)
    assert float((out - expected).abs().max()) < 1e-2 * float(expected.abs().max())


@settings(max_examples=60, deadline=None)
@given(new=st.integers(1, 140), before=st.integers(0, 200), spare=st.integers(0, 70), seed=st.integers(0, 9))
def test_attention_to_any_number_of_slots(compiled: Kernels, new: int, before: int, spare: int, seed: int) -> None:
    """Whatever finite numbers stand in the slots beyond."""
    total = before + new
    keys, values = random_slots(2, total + spare, 32, seed)
    keys[:, total:], values[:, total:] = 3e4, -3e4
    query = torch.randn(new, 4, 32, generator=torch.Generator().manual_seed(seed))
    out = torch.empty_like(query)
    assert compiled.attend(query, keys, values, total, 0.2 * LOG2_E, LIMIT, out)
    expected = reference(query, keys, values, total, 0.2)
    assert float((out - expected).abs().max()) < 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("factor", [300.0, -300.0])
def test_sums_out_of_range_are_told_and_computed_otherwise(factor: float, compiled: Kernels) -> None:
    keys, values = random_slots(2, 90, 32)
    keys[..., 0] = 1.0
    query = torch.zeros(20, 4, 32)
    query[..., 0] = 1.0
    query[7, 3, 0] = factor
    out = torch.empty_like(query)
    assert not compiled.attend(query, keys, values, 90, LOG2_E, LIMIT, out)
    attend(query, keys, values, 90, 1.0, out)
    expected = reference(query, keys, values, 90, 1.0)
    assert float((out - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_not_a_number_is_told(compiled: Kernels) -> None:
    keys, values = random_slots(1, 40, 32)
    query = torch.randn(4, 1, 32)
    query[2, 0, 5] = float("nan")
    assert not compiled.attend(query, keys, values, 40, 0.2, LIMIT, torch.empty_like(query))


def made_blocks(lengths: list[int], width: int = 32, narrow: bool = False) -> list[ResidentBlock]:
    """Every third one of eight bits where some are."""
    source = torch.Generator().manual_seed(5)
    made = []
    for number, length in enumerate(lengths):
        slots, scales = torch.randn(2, 3, 2, length, width, generator=source).bfloat16(), None
        if narrow and number % 3 == 0:
            keys, values, scales = quantised(slots[0], slots[1])
            slots = torch.stack([keys, values])
        made.append(ResidentBlock(str(number), slots, scales))
    return made


def wide(slots: Slots) -> Tensor:
    """Its numbers, in float32."""
    kept, start, stop, scales = slots.piece
    return kept[:, :, :, start:stop].float() if scales is None else widened(kept, start, stop, scales)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.sampled_from([32, 64]), spare=st.integers(0, 5), scaling=st.sampled_from([1.0, 1.2]))
def test_placing(compiled: Kernels, data: st.DataObject, width: int, spare: int, scaling: float) -> None:
    """Blocks and slices of blocks; nothing beyond them is touched."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    blocks = made_blocks(lengths, width, data.draw(st.booleans()))
    chosen: list[Slots] = []
    for block in data.draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=8)):
        start = data.draw(st.integers(0, block.num_slots - 1))
        stop = data.draw(st.integers(start + 1, block.num_slots))
        chosen.append(block if data.draw(st.booleans()) else SlotSlice(block, start, stop))
    whole = sum(block.num_slots for block in chosen)
    frequencies = 10000.0 ** -(torch.arange(0, width, 2) / width)
    phases = Rotation(width, tuple(frequencies.tolist()), scaling).phases(torch.arange(whole))
    out = torch.full((2, 3, 2, whole + spare, width), 9.0, dtype=torch.bfloat16)
    compiled.place([block.piece for block in chosen], phases, out)
    joined = torch.cat([wide(block) for block in chosen], dim=3)
    expected = torch.empty(joined[0].shape)
    rotate_into(expected, joined[0], phases)
    placed = out[..., :whole, :]
    assert torch.equal(placed[1], joined[1].bfloat16())
    # rounded to bfloat16 once: half of the last of eight bits, and what float32 leaves open
    assert bool(((placed[0].float() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all())
    assert bool((out[..., whole:, :] == 9.0).all())


def test_placing_refuses_what_does_not_fit(compiled: Kernels) -> None:
    (block,), (narrow,) = made_blocks([10]), made_blocks([10], narrow=True)
    phases = torch.ones(10, 16, dtype=torch.complex64)
    for room, known in ((9, phases), (10, phases[:9]), (10, phases.repeat(1, 2)[:, :16])):
        with pytest.raises(ValueError, match=r"10 slots|phases: .*\(32, 1\)"):
            compiled.place([block.piece], known, torch.empty(2, 3, 2, room, 32, dtype=torch.bfloat16))
    fits = torch.empty(2, 3, 2, 10, 32, dtype=torch.bfloat16)
    for piece in (
        (block.slots, 0, 11, None),
        (block.slots, -1, 5, None),
        (block.slots, 6, 5, None),
        (block.slots[:, :2].contiguous(), 0, 10, None),
        (block.slots[..., :5, :], 0, 5, None),
        (block.slots.float(), 0, 10, None),
        (block.slots.view(2, 6, 10, 32), 0, 10, None),
        (narrow.slots, 0, 10, None),
        (block.slots, 0, 10, narrow.scales),
    ):
        with pytest.raises(ValueError, match="slots"):
            compiled.place([piece], phases, fits)
    assert narrow.scales is not None
    channels, by_slot = narrow.scales
    for scales in ((channels[:1], by_slot), (channels, by_slot[..., :9]), (channels.float(), by_slot)):
        with pytest.raises(ValueError, match="scales"):
            compiled.place([(narrow.slots, 0, 10, scales)], phases, fits)
    for out in (fits.float(), fits.view(1, 6, 2, 10, 32), fits.transpose(1, 2), fits.view(2, 3, 2, 20, 16)):
        with pytest.raises(ValueError, match=r"slots|out"):
            compiled.place([block.piece], phases, out)
    for known in (phases.to(torch.complex128), phases[:, :8].contiguous(), phases.conj()):
        with pytest.raises(ValueError, match="phases"):
            compiled.place([block.piece], known, fits)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_and_without_kernels(
    family: str, compiled: bool, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composed prompts, then steps of several sequences in one pass, against the explicit mask."""
    calls = []
    if compiled:
        library = kernels_here()
        for name in ("attend", "place"):
            original = getattr(library, name)
            counted = lambda *given, name=name, original=original: calls.append(name) or original(*given)  # noqa: E731
            monkeypatch.setattr(library, name, counted)
    else:
        for module in (compiled_attention, slots):
            monkeypatch.setattr(module, "kernels", lambda: None)
    stock = make_tiny_model(family, head_dim=32, hidden_size=128, initializer_range=0.1)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype=kv_dtype)
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


ATTENDED: dict[str, Any] = {
    "query": torch.ones(3, 4, 32),
    "keys": torch.ones(2, 9, 32, dtype=torch.bfloat16),
    "values": torch.ones(2, 9, 32, dtype=torch.bfloat16),
    "total": 9,
    "out": torch.empty(3, 4, 32),
}


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("query", torch.ones(3, 4, 32, dtype=torch.float64)),
        ("query", torch.ones(3, 128)),
        ("query", torch.ones(4, 3, 32).transpose(0, 1)),
        ("query", torch.ones(3, 5, 32)),
        ("query", torch.ones(3, 4, 32, device="meta")),
        ("out", torch.empty(3, 4, 32, dtype=torch.bfloat16)),
        ("out", torch.empty(3, 4, 16)),
        ("out", torch.empty(2, 4, 32)),
        ("out", torch.empty(4, 3, 32).transpose(0, 1)),
        ("out", torch.empty(3, 4, 32, device="meta")),
        ("keys", torch.ones(2, 9, 32)),
        ("keys", torch.ones(2, 9, 64, dtype=torch.bfloat16)),
        ("keys", torch.ones(9, 2, 32, dtype=torch.bfloat16).transpose(0, 1)),
        ("keys", torch.ones(9, 32, dtype=torch.bfloat16)),
        ("values", torch.ones(2, 9, 32)),
        ("values", torch.ones(2, 8, 32, dtype=torch.bfloat16)),
        ("values", torch.ones(2, 12, 32, dtype=torch.bfloat16)[:, :9]),
        ("total", 10),
        ("total", 2),
        ("total", -1),
    ],
)
def test_attention_refuses_what_does_not_fit(compiled: Kernels, argument: str, wrong: Any) -> None:
    given = {**ATTENDED, argument: wrong}
    if argument == "query" and wrong.shape != ATTENDED["out"].shape:
        given["out"] = torch.empty(wrong.shape)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        compiled.attend(**given, scaling=1.0, limit=LIMIT)


@pytest.mark.parametrize("shape", [(0, 4, 32), (3, 0, 32), (3, 3, 32)])
def test_attention_refuses_no_tokens_and_heads_that_are_no_groups(compiled: Kernels, shape: tuple[int, ...]) -> None:
    given = {**ATTENDED, "query": torch.ones(shape), "out": torch.empty(shape)}
    with pytest.raises(ValueError, match=r"tokens|heads"):
        compiled.attend(**given, scaling=1.0, limit=LIMIT)


def test_other_processors_do_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = native.kernels()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    native.kernels.cache_clear()
    with caplog.at_level(logging.INFO):
        assert native.kernels() is None
    assert "this is riscv64" in caplog.text
    native.kernels.cache_clear()
    monkeypatch.undo()
    assert (native.kernels() is None) == (before is None)
