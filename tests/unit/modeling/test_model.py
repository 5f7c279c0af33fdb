"""Slot attention against the stock model: any families, any composition, any interleaving."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.errors import DataError, InvalidRequestError, PromptTooLongError
from blockrag.modeling.model import SlotModel
from blockrag.modeling.rotary import Rotation
from blockrag.modeling.slots import SequenceState, SlotSlice, wide_slots
from blockrag.modeling.stock_passes import additive_mask, block_mask
from blockrag.types import BlockKV
from tests.models import FAMILIES, TINY_VOCAB, make_tiny_model

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TOLERANCE = 1e-4
STOCK = make_tiny_model("llama")
SLOTS = SlotModel.from_pretrained_model(copy.deepcopy(STOCK))


def tokens(count: int, seed: int = 0) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(TINY_VOCAB) for _ in range(count)]


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, blocks: Sequence[Sequence[int]], final: Sequence[int]) -> Tensor:
    """Logits of every position, [T, vocab], under the explicit block mask."""
    ids = [token for block in blocks for token in block] + list(final)
    mask = additive_mask(block_mask([len(block) for block in blocks], len(final)), torch.float32)
    return model(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0]


def compose(model: SlotModel, blocks: Sequence[Sequence[int]], capacity: int) -> SequenceState:
    encoded = model.encode(blocks, [str(number) for number in range(len(blocks))])
    return model.new_sequence([model.to_resident(block) for block in encoded], capacity)


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("rope", [None, LLAMA3, YARN, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_rotary_variants(family: str, rope: dict[str, Any] | None) -> None:
    overrides = {} if rope is None else {"rope_parameters": rope}
    stock = make_tiny_model(family, tie_word_embeddings=family != "mistral", **overrides)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    blocks, final = [tokens(1), tokens(37, 1), tokens(80, 2)], tokens(11, 3)
    state = compose(model, blocks, len(final))
    assert state.num_slots == 118
    assert close(model.forward([(state, final)])[0], stock_logits(stock, blocks, final)[-1])
    full = model.new_sequence([], 40)
    assert close(model.forward([(full, tokens(40))])[0], stock_logits(stock, [], tokens(40))[-1])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_head_groups(kv_heads: int) -> None:
    stock = make_tiny_model("llama", num_key_value_heads=kv_heads)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    blocks, final = [tokens(9, 1), tokens(5, 2)], tokens(3, 3)
    got = model.forward([(compose(model, blocks, 3), final)])[0]
    assert close(got, stock_logits(stock, blocks, final)[-1])


@pytest.mark.parametrize(("blocks", "final"), [([], 130), ([70], 60), ([1, 250, 3], 33), ([40, 40], 1)])
def test_long_finals_agree_with_the_mask(blocks: list[int], final: int) -> None:
    placed = [tokens(length, number) for number, length in enumerate(blocks)]
    question = tokens(final, 99)
    got = SLOTS.forward([(compose(SLOTS, placed, final), question)])[0]
    assert close(got, stock_logits(STOCK, placed, question)[-1])


@pytest.mark.parametrize("spare", [0, 5, 500])
@pytest.mark.parametrize(("blocks", "final"), [([], 130), ([70], 60), ([1, 250, 3], 33)])
def test_slots_of_bfloat16_agree_with_the_mask_whatever_stands_in_reserved_ones(
    blocks: list[int], final: int, spare: int
) -> None:
    model = SlotModel.from_pretrained_model(copy.deepcopy(STOCK), kv_dtype="bfloat16")
    for seed in range(2):  # the second sequence gets the first one's memory
        placed = [tokens(length, seed + number) for number, length in enumerate(blocks)]
        question = tokens(final, 99 + seed)
        state = compose(model, placed, final + spare)
        got = model.forward([(state, question)])[0]
        assert close(got, stock_logits(STOCK, placed, question)[-1], 3e-2)
        state.release()


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [40.0, 300.0])
def test_large_scores_stay_in_range(factor: float, kv_dtype: str) -> None:
    """Exponentials of large scores overflow unless each row's maximum is subtracted."""
    stock = make_tiny_model("llama")
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)
            layer.self_attn.k_proj.weight.mul_(factor)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype=kv_dtype)
    blocks, question = [tokens(40, 1), tokens(30, 2)], tokens(25, 3)
    got = model.forward([(compose(model, blocks, 25), question)])[0]
    assert bool(torch.isfinite(got).all())
    if kv_dtype == "float32":
        assert close(got, stock_logits(stock, blocks, question)[-1], 2e-3)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_any_composition_equals_the_explicit_mask(lengths: list[int], pieces: list[int], order: random.Random) -> None:
    """Blocks of any lengths in any order, and a final block that comes in pieces of any lengths."""
    blocks = [tokens(length, number) for number, length in enumerate(lengths)]
    order.shuffle(blocks)
    final = tokens(sum(pieces), 77)
    expected = stock_logits(STOCK, blocks, final)
    state = compose(SLOTS, blocks, len(final))
    start = state.num_slots
    for length in pieces:
        done = state.num_slots - start
        got = SLOTS.forward([(state, final[done : done + length])])[0]
        assert close(got, expected[state.num_slots - 1])
    assert state.free_slots == 0
    state.release()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 4))
def test_interleaved_sequences_equal_each_alone(steps: list[tuple[int, int]], batch: int) -> None:
    """Several sequences that share resident blocks, advanced in ragged batches of any make-up."""
    shared = [SLOTS.to_resident(block) for block in SLOTS.encode([tokens(12, 1), tokens(7, 2)], ["a", "b"])]
    choices = [shared, shared[::-1], shared[:1], []]
    plain = [tokens(12, 1), tokens(7, 2)]
    prefixes = [plain, plain[::-1], plain[:1], []]
    states = [SLOTS.new_sequence(blocks, 120) for blocks in choices]
    appended: list[list[int]] = [[], [], [], []]
    for first in range(0, len(steps), batch):
        work = dict(steps[first : first + batch])
        fresh = {number: tokens(count, 1000 + first + number) for number, count in work.items()}
        logits = SLOTS.forward([(states[number], ids) for number, ids in fresh.items()])
        for row, (number, ids) in enumerate(fresh.items()):
            appended[number] += ids
            assert close(logits[row], stock_logits(STOCK, prefixes[number], appended[number])[-1])
    for state in states:
        state.release()


def test_long_inputs_equal_the_stock_model() -> None:
    """Where linear layers and attention change their way of computing."""
    stock = make_tiny_model("qwen2")
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    for length in (127, 128, 300):
        got = model.forward([(model.new_sequence([], length), tokens(length))])[0]
        assert close(got, stock_logits(stock, [], tokens(length))[-1])


def test_batched_encoding_equals_each_block_alone() -> None:
    blocks = [tokens(length, length) for length in (1, 2, 33, 16, 128)]
    together = SLOTS.encode(blocks, list("abcde"))
    for block, name, ids in zip(together, "abcde", blocks, strict=True):
        (alone,) = SLOTS.encode([ids], [name])
        assert block.key == alone.key == name
        assert block.token_ids.dtype == np.int32
        assert block.token_ids.tolist() == ids
        assert block.keys.shape == block.values.shape == (3, 2, len(ids), 8)
        np.testing.assert_allclose(block.keys, alone.keys, atol=2e-5)
        np.testing.assert_allclose(block.values, alone.values, atol=2e-5)
        assert block.nbytes == len(ids) * SLOTS.slot_bytes


def test_block_keys_are_the_projections_before_rotation() -> None:
    kept: list[Tensor] = []
    handle = STOCK.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: kept.append(call[2]))
    stock_logits(STOCK, [], tokens(10))
    handle.remove()
    (block,) = SLOTS.encode([tokens(10)], ["a"])
    projected = kept[0][0].view(10, 2, 8).transpose(0, 1)[..., Rotation(8, (1.0,) * 4).order]
    np.testing.assert_allclose(block.keys[0], projected.numpy(), atol=2e-5)


def test_resident_blocks_are_private_copies() -> None:
    (block,) = SLOTS.encode([tokens(6)], ["a"])
    block.keys.flags.writeable = block.values.flags.writeable = False  # as they come out of the object store
    resident = SLOTS.to_resident(block)
    assert (resident.key, resident.num_slots, resident.nbytes) == ("a", 6, block.nbytes)
    assert resident.keys.data_ptr() != block.keys.ctypes.data
    before = resident.keys.clone()
    state = SLOTS.new_sequence([resident, resident], 4)
    SLOTS.forward([(state, tokens(4))])
    assert torch.equal(resident.keys, before)


def test_the_cost_of_a_pass_is_its_weights_and_its_scores() -> None:
    (block,) = SLOTS.encode([tokens(6)], ["a"])
    resident = SLOTS.to_resident(block)
    empty, composed = SLOTS.new_sequence([], 9), SLOTS.new_sequence([resident, resident], 9)
    weights = sum(parameter.numel() for parameter in STOCK.parameters())
    scores = 2 * STOCK.config.num_hidden_layers * STOCK.config.num_attention_heads * SLOTS.head_dim * 12
    assert SLOTS.multiply_adds([(empty, 4)]) == 4 * weights
    assert SLOTS.multiply_adds([(empty, 1), (composed, 3)]) == 4 * weights + 3 * scores


def test_bfloat16_cache_halves_the_bytes_and_stays_close() -> None:
    stock = make_tiny_model("qwen3")
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype="bfloat16")
    (block,) = model.encode([tokens(20)], ["a"])
    assert block.keys.dtype == np.uint16
    assert block.nbytes == 20 * model.slot_bytes == 20 * SLOTS.slot_bytes // 2
    resident = model.to_resident(block)
    assert resident.keys.dtype == torch.bfloat16
    got = model.forward([(model.new_sequence([resident], 5), tokens(5, 1))])[0]
    assert close(got, stock_logits(stock, [tokens(20)], tokens(5, 1))[-1], 5e-2)


def test_blocks_in_eight_bits_take_half_of_that_and_stay_close() -> None:
    stock = make_tiny_model("qwen3")
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype="int8")
    wide = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    (block,), (exact,) = (each.encode([tokens(20)], ["a"]) for each in (model, wide))
    assert block.keys.dtype == block.values.dtype == np.int8
    assert block.scales is not None
    assert [array.shape for array in block.scales] == [(2, 3, 2, 8), (3, 2, 20)]
    assert block.nbytes == 20 * model.slot_bytes + 2 * (2 * 3 * 2 * 8 + 3 * 2 * 20)
    resident = model.to_resident(block)
    assert (resident.nbytes, resident.num_slots) == (block.nbytes, 20)
    kept = wide_slots(resident)
    assert kept.dtype == torch.bfloat16
    for part, expected in zip(kept, (exact.keys, exact.values), strict=True):
        channels = np.abs(expected).max(2, keepdims=True)  # a step is less than a hundredth of the largest
        assert (
            np.abs(part.float().numpy() - expected)
            <= np.maximum(channels, np.abs(expected).max(3, keepdims=True)) / 100
        ).all()
    slices = [SlotSlice(resident, 0, 7), SlotSlice(resident, 7, 20)]
    answers = [model.forward([(model.new_sequence(blocks, 5), tokens(5, 1))])[0] for blocks in ([resident], slices)]
    assert torch.equal(*answers)
    assert close(answers[0], stock_logits(stock, [tokens(20)], tokens(5, 1))[-1], 8e-2)
    with pytest.raises(DataError, match="block a"):
        model.to_resident(replace(block, scales=None))
    with pytest.raises(DataError, match="block a"):
        wide.to_resident(block)


def test_bfloat16_weights() -> None:
    stock = make_tiny_model("llama").to(torch.bfloat16)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype="bfloat16")
    blocks, final = [tokens(30), tokens(9, 1)], tokens(12, 2)
    logits = model.forward([(compose(model, blocks, 12), final)])
    assert logits.dtype == torch.float32
    assert close(logits[0], stock_logits(make_tiny_model("llama"), blocks, final)[-1], 8e-2)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_a_sliding_window_limits_what_is_seen_and_not_the_positions(kv_dtype: str) -> None:
    stock = make_tiny_model("mistral", sliding_window=32)
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock), kv_dtype=kv_dtype)
    assert model.max_positions == 2048
    state = model.new_sequence([], 300)
    with torch.inference_mode():
        expected = stock(torch.tensor([tokens(300)]), use_cache=False).logits[0]
    for start, end in ((0, 20), (20, 280), (280, 299), (299, 300)):
        got = model.forward([(state, tokens(300)[start:end])])[0]
        assert close(got, expected[end - 1], TOLERANCE if kv_dtype == "float32" else 3e-2)


def test_window_that_layer_types_switch_off_limits_nothing() -> None:
    stock = make_tiny_model("qwen2", sliding_window=32, use_sliding_window=False)
    assert SlotModel.from_pretrained_model(stock).max_positions == 2048


@pytest.mark.parametrize("bad", [[], [-1], [TINY_VOCAB], [[1, 2]]])
def test_refuses_token_ids_that_are_none(bad: list[Any]) -> None:
    state = SLOTS.new_sequence([], 8)
    with pytest.raises(InvalidRequestError, match="token_ids"):
        SLOTS.encode([tokens(3), bad], ["a", "b"])
    with pytest.raises(InvalidRequestError, match="token_ids"):
        SLOTS.forward([(state, bad)])
    assert state.num_slots == 0


def test_refuses_what_does_not_fit_and_changes_nothing() -> None:
    small, large = SLOTS.new_sequence([], 4), SLOTS.new_sequence([], 40)
    SLOTS.forward([(small, tokens(3)), (large, tokens(3))])
    with pytest.raises(ValueError, match="2 tokens do not fit: 3 of the sequence's 4 slots are used"):
        SLOTS.forward([(large, tokens(5)), (small, tokens(2))])
    assert (small.num_slots, large.num_slots) == (3, 3)
    assert (small.capacity, small.free_slots) == (4, 1)
    with pytest.raises(ValueError, match="twice"):
        SLOTS.forward([(large, tokens(1)), (large, tokens(1))])
    with pytest.raises(PromptTooLongError):
        SLOTS.encode([tokens(SLOTS.max_positions + 1)], ["long"])
    with pytest.raises(PromptTooLongError):
        SLOTS.new_sequence([], SLOTS.max_positions + 1)
    with pytest.raises(ValueError, match="negative"):
        SLOTS.new_sequence([], -1)
    with pytest.raises(ValueError, match="2 blocks and 1 keys"):
        SLOTS.encode([tokens(1), tokens(2)], ["a"])


def test_release_twice_and_use_after_release() -> None:
    state = SLOTS.new_sequence([], 8)
    state.release()
    state.release()
    assert state.released
    with pytest.raises(ValueError, match="was released"):
        SLOTS.forward([(state, tokens(1))])


def test_released_memory_is_used_again_and_never_shared() -> None:
    first = SLOTS.new_sequence([], 500)
    address = first.layer(0)[0].data_ptr()
    first.release()
    second, third = SLOTS.new_sequence([], 500), SLOTS.new_sequence([], 500)
    addresses = {state.layer(0)[0].data_ptr() for state in (second, third)}
    assert address in addresses
    assert len(addresses) == 2


def test_nothing_to_do_is_no_error() -> None:
    assert SLOTS.encode([], []) == []
    assert SLOTS.forward([]).shape == (0, TINY_VOCAB)


@pytest.mark.parametrize("broken", ["shape", "type"])
def test_refuses_a_block_of_another_model(broken: str) -> None:
    (block,) = SLOTS.encode([tokens(4)], ["a"])
    keys = block.keys[:2] if broken == "shape" else block.keys.astype(np.float16)
    wrong = BlockKV(key="a", token_ids=block.token_ids, keys=keys, values=block.values)
    with pytest.raises(DataError, match="block a: float"):
        SLOTS.to_resident(wrong)
