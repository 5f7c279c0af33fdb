"""Blocks know whether they are what was made."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.types import BlockKV, ChunkEmbeddings

SHAPE = (2, 1, 3, 5)  # 60 bytes in bfloat16: no whole number of words


def block(random: np.random.Generator, *, int8: bool = False) -> BlockKV:
    dtype: type = np.int8 if int8 else np.uint16
    keys, values = (random.integers(0, 100, SHAPE).astype(dtype) for _ in range(2))
    scales = None
    if int8:
        scales = (np.ones((2, 2, 1, 5), dtype=np.uint16), np.ones(SHAPE[:3], dtype=np.uint16))
    return BlockKV("key", np.arange(3, dtype=np.int32), keys, values, scales)


@given(seed=st.integers(0, 2**32 - 1), int8=st.booleans())
def test_any_byte_that_changes_is_noticed(seed: int, int8: bool) -> None:
    random = np.random.default_rng(seed)
    made = pickle.loads(pickle.dumps(block(random, int8=int8)))
    assert made.intact
    arrays = [made.token_ids, made.keys, made.values, *(made.scales or ())]
    content = arrays[random.integers(len(arrays))].reshape(-1).view(np.uint8)
    content[random.integers(content.size)] ^= 1 << int(random.integers(8))
    assert not made.intact


def test_what_is_made_of_a_block_has_a_sum_of_its_own() -> None:
    made = block(np.random.default_rng(0))
    other = replace(made, keys=made.keys + 1)
    assert other.intact
    assert other.checksum != made.checksum


@pytest.mark.parametrize("order", ["C", "F"])
def test_embeddings_in_any_layout(order: str) -> None:
    values = np.asarray(np.random.default_rng(0).normal(size=(3, 5)), dtype=np.float32, order=order)  # type: ignore[call-overload]
    made = ChunkEmbeddings("key", np.arange(3, dtype=np.int32), values)
    assert made.intact
    assert made.checksum == ChunkEmbeddings("key", made.token_ids, np.ascontiguousarray(values)).checksum
    values[1, 2] += 1
    assert not made.intact
