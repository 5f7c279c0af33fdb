from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.errors import InvalidRequestError
from blockrag.training.pear.passes import ProxyTask, ordinary_tokens


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 9), distractors=st.integers(0, 4), spare=st.integers(0, 5), seed=st.integers(0, 99))
def test_the_second_copy_repeats_one_block_of_different_tokens(n: int, distractors: int, spare: int, seed: int) -> None:
    task = ProxyTask(n, "block" if distractors else "full", distractors)
    candidates = torch.arange(7, 7 + (distractors + 1) * n + spare)

    tokens = task.draw(5, candidates, torch.Generator().manual_seed(seed))

    assert tokens.shape == (5, task.length)
    for row in tokens.tolist():
        before, copy = row[:-n], row[-n:]
        assert len(set(before)) == len(before) and set(before) <= set(candidates.tolist())
        assert copy in [before[start : start + n] for start in range(0, len(before), n)]


def test_the_first_copy_stands_in_every_place() -> None:
    task = ProxyTask(3, "block", 2)
    tokens = task.draw(60, torch.arange(20), torch.Generator().manual_seed(0))
    places = {row[:9].index(row[9]) // 3 for row in tokens.tolist()}

    assert places == {0, 1, 2}


def test_blocks() -> None:
    tokens = torch.arange(9)[None]

    assert [block.tolist() for block in ProxyTask(3, "block", 1).blocks(tokens)] == [
        [[0, 1, 2]],
        [[3, 4, 5]],
        [[6, 7, 8]],
    ]
    assert [block.tolist() for block in ProxyTask(3, "full", 1).blocks(tokens)] == [[[0, 1, 2, 3, 4, 5]], [[6, 7, 8]]]


def test_special_tokens_are_no_candidates() -> None:
    assert ordinary_tokens(6, [0, 3, 99]).tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: ProxyTask(1), "n: 1 tokens per copy"),
        (lambda: ProxyTask(4, "block", 0), "distractors: 0; the block mask differs from the full one from 1 on"),
        (lambda: ProxyTask(4, "full", -1), "distractors: -1"),
        (
            lambda: ProxyTask(4, "block", 2).draw(1, torch.arange(11), torch.Generator()),
            "n: a prompt needs 12 different tokens, where the vocabulary has 11",
        ),
    ],
)
def test_refuses(make: object, problem: str) -> None:
    assert callable(make)
    with pytest.raises(InvalidRequestError, match=problem):
        make()
