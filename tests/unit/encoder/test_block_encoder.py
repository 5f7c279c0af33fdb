from __future__ import annotations

import asyncio

import numpy as np
import pytest

from blockrag.encoder.block_encoder import BlockEncoder
from blockrag.errors import InvalidRequestError
from blockrag.modeling.model import SlotModel
from blockrag.types import BlockRequest
from tests.models import TINY_VOCAB, make_tiny_model

LONGEST = 128
"""Positions of the model."""


@pytest.fixture(scope="module")
def model() -> SlotModel:
    return SlotModel.from_pretrained_model(make_tiny_model(max_position_embeddings=LONGEST))


def make_encoder(model: SlotModel, max_batch_tokens: int = 64) -> BlockEncoder:
    return BlockEncoder(model, max_batch_tokens=max_batch_tokens, batch_wait_ms=1.0, threads=1)


def block(key: str, tokens: int) -> BlockRequest:
    ids = np.random.default_rng(tokens).integers(0, TINY_VOCAB, tokens, dtype=np.int32)
    return BlockRequest(key=key, token_ids=ids, tenant="t")


async def test_batched_blocks_equal_blocks_encoded_alone(model: SlotModel) -> None:
    wanted = [block(f"k{length}", length) for length in (1, 5, 40, 17, 90, 3)]
    encoder = make_encoder(model)
    together = await asyncio.gather(*(encoder.encode(each) for each in wanted))
    assert encoder.stats.items == 6
    assert encoder.stats.size == 156
    assert 1 < encoder.stats.batches < 6
    for request, encoded in zip(wanted, together, strict=True):
        [alone] = model.encode([request.token_ids.tolist()], [request.key])
        assert encoded.key == request.key
        np.testing.assert_array_equal(encoded.token_ids, request.token_ids)
        np.testing.assert_allclose(encoded.keys, alone.keys, atol=1e-5)
        np.testing.assert_allclose(encoded.values, alone.values, atol=1e-5)


async def test_a_blocks_arrays_are_its_own(model: SlotModel) -> None:
    """A view of the batch would drag the whole batch into the object store."""
    encoder = make_encoder(model)
    for encoded in await asyncio.gather(*(encoder.encode(block(f"k{length}", length)) for length in (5, 9))):
        for array in (encoded.keys, encoded.values):
            assert array.flags.c_contiguous
            base = array.base
            assert base is None or not isinstance(base, np.ndarray) or base.nbytes == array.nbytes


async def test_a_bad_block_does_not_fail_its_neighbours(model: SlotModel) -> None:
    encoder = make_encoder(model)
    bad = BlockRequest(key="bad", token_ids=np.array([TINY_VOCAB], dtype=np.int32), tenant="t")
    outcomes = await asyncio.gather(
        encoder.encode(block("a", 5)), encoder.encode(bad), encoder.encode(block("b", 5)), return_exceptions=True
    )
    assert [type(outcome).__name__ for outcome in outcomes] == ["BlockKV", "InvalidRequestError", "BlockKV"]


@pytest.mark.parametrize(
    ("token_ids", "problem"),
    [
        ([], "at least one token"),
        ([3, TINY_VOCAB], "vocabulary"),
        ([-1], "vocabulary"),
        ([0] * (LONGEST + 1), f"{LONGEST + 1} tokens, where the model has {LONGEST}"),
        ([[1, 2]], "at least one token"),
    ],
)
async def test_what_cannot_be_encoded_is_refused(model: SlotModel, token_ids: list[int], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        make_encoder(model).check(np.array(token_ids, dtype=np.int32), block="blocks[2].")
    assert caught.value.field == "blocks[2].token_ids"


async def test_a_block_as_long_as_the_model_is_accepted_and_no_longer_one(model: SlotModel) -> None:
    encoder, block = make_encoder(model), np.full(LONGEST + 1, TINY_VOCAB - 1, dtype=np.int32)
    encoder.check(block[:LONGEST])
    with pytest.raises(InvalidRequestError, match=f"{LONGEST + 1} tokens, where the model has {LONGEST} positions"):
        encoder.check(block)
