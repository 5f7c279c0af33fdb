"""Mixtures of full and compressed blocks against the stock model: any families, any masks, any lengths."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.budget import chunk_bounds, chunk_count, composed_slots
from blockrag.errors import InvalidRequestError, PromptTooLongError
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import compose_passage, mixed_inputs
from blockrag.modeling.slots import ResidentBlock, SequenceState, SlotSlice, wide_slots
from blockrag.modeling.stock_passes import ChosenSlot, additive_mask, block_mask, pass_block, pass_final
from tests.models import FAMILIES, TINY_VOCAB, make_tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
STOCK = make_tiny_model("llama")
SLOTS = SlotModel.from_pretrained_model(copy.deepcopy(STOCK))
WIDTH = 32


def tokens(count: int, seed: int = 0) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(TINY_VOCAB) for _ in range(count)]


def projected(passage: Sequence[int], chunk: int) -> Tensor:
    """Stands for a projected chunk embedding: any vector that depends on the chunk."""
    generator = torch.Generator().manual_seed(sum(passage) + chunk)
    return 0.3 * torch.randn(chunk_count(len(passage), chunk), WIDTH, generator=generator)


def masks_of(passages: Sequence[Sequence[int]], chunk: int, chooser: random.Random) -> list[list[bool]]:
    return [[chooser.random() < 0.5 for _ in chunk_bounds(len(passage), chunk)] for passage in passages]


def blocks_of(
    model: SlotModel, passages: Sequence[Sequence[int]], chunk: int
) -> list[tuple[ResidentBlock, ResidentBlock]]:
    names = [str(number) for number in range(len(passages))]
    full = model.encode(passages, names)
    compressed = model.encode_embeddings([projected(passage, chunk) for passage in passages], passages, names)
    return [(model.to_resident(one), model.to_resident(other)) for one, other in zip(full, compressed, strict=True)]


def composed(
    model: SlotModel,
    passages: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    chunk: int,
    capacity: int,
) -> SequenceState:
    pieces = [
        piece
        for (full, compressed), mask in zip(blocks_of(model, passages, chunk), masks, strict=True)
        for piece in compose_passage(full, compressed, mask, chunk)
    ]
    return model.new_sequence(pieces, capacity)


def expected_logits(
    stock: PreTrainedModel,
    passages: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    chunk: int,
    final: Sequence[int],
) -> Tensor:
    slots = []
    with torch.no_grad():
        for passage, mask in zip(passages, masks, strict=True):
            full = pass_block(stock, stock.get_input_embeddings()(torch.tensor(passage)))
            compressed = pass_block(stock, projected(passage, chunk))
            for place, token in enumerate(range(len(passage))):
                if mask[token // chunk]:
                    slots.append(ChosenSlot(full, place))
                elif token % chunk == 0:
                    slots.append(ChosenSlot(compressed, token // chunk))
        return pass_final(stock, slots, final)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("rope", [None, YARN])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, rope: dict[str, Any] | None) -> None:
    stock = make_tiny_model(family, **({"rope_parameters": rope} if rope else {}))
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    passages, final = [tokens(1), tokens(37, 1), tokens(64, 2), tokens(5, 3)], tokens(9, 4)
    masks = masks_of(passages, 8, random.Random(3))
    state = composed(model, passages, masks, 8, len(final))
    assert state.num_slots == sum(composed_slots([len(p)], mask, 8) for p, mask in zip(passages, masks, strict=True))
    assert close(model.forward([(state, final)])[0], expected_logits(stock, passages, masks, 8, final)[-1])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=5),
    chunk=st.integers(1, 12),
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    chooser=st.randoms(use_true_random=False),
)
def test_any_mixture_equals_the_explicit_passes(
    lengths: list[int], chunk: int, pieces: list[int], chooser: random.Random
) -> None:
    """Passages shorter than k, k that does not divide, any masks, any order; a final block in any pieces."""
    passages = [tokens(length, number) for number, length in enumerate(lengths)]
    chooser.shuffle(passages)
    masks, final = masks_of(passages, chunk, chooser), tokens(sum(pieces), 77)
    expected = expected_logits(STOCK, passages, masks, chunk, final)
    state = composed(SLOTS, passages, masks, chunk, len(final))
    done = 0
    for length in pieces:
        got = SLOTS.forward([(state, final[done : done + length])])[0]
        done += length
        assert close(got, expected[done - 1])
    state.release()


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 40), chunk=st.integers(1, 12), expand=st.booleans())
def test_one_form_alone_is_that_block_to_the_bit(length: int, chunk: int, expand: bool) -> None:
    passages = [tokens(11, 5), tokens(length, 6)]
    ((first, _), (full, compressed)) = blocks_of(SLOTS, passages, chunk)
    pieces = compose_passage(full, compressed, [expand] * chunk_count(length, chunk), chunk)
    assert len(pieces) == 1
    mixed = SLOTS.new_sequence([first, *pieces], 4)
    plain = SLOTS.new_sequence([first, full if expand else compressed], 4)
    assert torch.equal(SLOTS.forward([(mixed, tokens(4))]), SLOTS.forward([(plain, tokens(4))]))
    for layer in range(SLOTS.num_layers):
        for one, other in zip(mixed.layer(layer), plain.layer(layer), strict=True):
            assert torch.equal(one, other)


def test_neighbouring_chunks_of_one_form_make_one_slice() -> None:
    ((full, compressed),) = blocks_of(SLOTS, [tokens(22)], 4)
    pieces = compose_passage(full, compressed, [True, True, False, False, True, True], 4)
    assert [(piece.block is full, piece.start, piece.stop) for piece in pieces] == [
        (True, 0, 8),
        (False, 2, 4),
        (True, 16, 22),
    ]
    assert torch.equal(wide_slots(pieces[1]), compressed.slots[:, :, :, 2:4])
    assert sum(piece.num_slots for piece in pieces) == composed_slots([22], [True, True, False, False, True, True], 4)


def test_only_the_forms_in_use_are_needed() -> None:
    ((full, compressed),) = blocks_of(SLOTS, [tokens(6)], 4)
    assert compose_passage(full, None, [True, True], 4) == [SlotSlice(full, 0, 6)]
    assert compose_passage(None, compressed, [False, False], 4) == [SlotSlice(compressed, 0, 2)]


@pytest.mark.parametrize(
    ("forms", "expanded", "problem"),
    [
        ("both", [], "at least one chunk"),
        ("both", [True], "1 decisions for 6 tokens"),
        ("compressed", [False], "1 decisions for 2 compressed"),
        ("compressed", [False, True], "full block is not there"),
        ("full", [False, True], "compressed block is not there"),
    ],
)
def test_refuses_decisions_that_do_not_fit(forms: str, expanded: list[bool], problem: str) -> None:
    ((full, compressed),) = blocks_of(SLOTS, [tokens(6)], 4)
    with pytest.raises(ValueError, match=problem):
        compose_passage(full if forms != "compressed" else None, compressed if forms != "full" else None, expanded, 4)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 7)])
def test_refuses_slices_outside_the_block(start: int, stop: int) -> None:
    ((full, _),) = blocks_of(SLOTS, [tokens(6)], 4)
    with pytest.raises(ValueError, match="of a block of 6"):
        SlotSlice(full, start, stop)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    chunk=st.integers(1, 12),
    chooser=st.randoms(use_true_random=False),
)
def test_reencoded_mixtures_equal_one_pass_under_the_block_mask(
    lengths: list[int], chunk: int, chooser: random.Random
) -> None:
    passages = [tokens(length, number) for number, length in enumerate(lengths)]
    masks, final = masks_of(passages, chunk, chooser), tokens(5, 9)
    inputs = [
        mixed_inputs(SLOTS, passage, projected(passage, chunk), mask, chunk)
        for passage, mask in zip(passages, masks, strict=True)
    ]
    blocks = SLOTS.encode_embeddings(inputs, passages, [str(number) for number in range(len(passages))])
    assert [block.token_ids.tolist() for block in blocks] == passages
    state = SLOTS.new_sequence([SLOTS.to_resident(block) for block in blocks], len(final))
    with torch.inference_mode():
        table = STOCK.get_input_embeddings().weight
        rows = []
        for passage, mask in zip(passages, masks, strict=True):
            vectors = projected(passage, chunk)
            for place, token in enumerate(passage):
                if mask[place // chunk]:
                    rows.append(table[token])
                elif place % chunk == 0:
                    rows.append(vectors[place // chunk])
        embedded = torch.stack([*rows, *(table[token] for token in final)])
        mask = additive_mask(block_mask([block.num_slots for block in blocks], len(final)), torch.float32)
        expected = STOCK(inputs_embeds=embedded[None], attention_mask=mask, use_cache=False).logits[0, -1]
    assert close(SLOTS.forward([(state, final)])[0], expected)


def test_tokens_as_embeddings_are_the_full_block() -> None:
    passage = tokens(21)
    inputs = mixed_inputs(SLOTS, passage, projected(passage, 4), [True] * 6, 4)
    assert torch.equal(inputs, SLOTS.embed_tokens(passage))
    (given_as_embeddings,) = SLOTS.encode_embeddings([inputs], [passage], ["a"])
    (given_as_tokens,) = SLOTS.encode([passage], ["a"])
    assert (given_as_embeddings.keys == given_as_tokens.keys).all()
    assert (given_as_embeddings.values == given_as_tokens.values).all()
    with pytest.raises(ValueError, match="5 decisions and 6 projected embeddings for 6 chunks"):
        mixed_inputs(SLOTS, passage, projected(passage, 4), [True] * 5, 4)


def test_refuses_embeddings_that_are_none() -> None:
    good = torch.zeros(2, WIDTH)
    for bad in (
        torch.zeros(2, WIDTH + 1),
        torch.zeros(0, WIDTH),
        torch.zeros(WIDTH),
        good + torch.inf,
        good * torch.nan,
    ):
        with pytest.raises(InvalidRequestError, match="embeddings"):
            SLOTS.encode_embeddings([good, bad], [[1], [2]], ["a", "b"])
    with pytest.raises(InvalidRequestError, match="token_ids"):
        SLOTS.encode_embeddings([good], [[]], ["a"])
    with pytest.raises(PromptTooLongError):
        SLOTS.encode_embeddings([torch.zeros(SLOTS.max_positions + 1, WIDTH)], [[1]], ["a"])
    with pytest.raises(ValueError, match="2 inputs, 1 blocks and 2 keys"):
        SLOTS.encode_embeddings([good, good], [[1]], ["a", "b"])
    assert SLOTS.encode_embeddings([], [], []) == []


def test_a_mixture_in_bfloat16_stays_close() -> None:
    model = SlotModel.from_pretrained_model(copy.deepcopy(STOCK), kv_dtype="bfloat16")
    passages, final = [tokens(40), tokens(30, 1)], tokens(12, 2)
    masks = masks_of(passages, 8, random.Random(1))
    got = model.forward([(composed(model, passages, masks, 8, 12), final)])[0]
    assert close(got, expected_logits(STOCK, passages, masks, 8, final)[-1], 5e-2)
