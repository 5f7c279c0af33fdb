from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.training.adaptation.batch import Branch
from blockrag.training.refrag.chunk_masks import (
    MaskSampler,
    all_places,
    answer_places,
    constant_mask,
    fill_budget,
    passage_ranking,
    question_order,
)

PASSAGES = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 30, 31, 32, 33], [1, 2, 40, 41, 5, 6]]


def slots(passages: list[list[int]], mask: tuple, k: int) -> int:  # type: ignore[type-arg]
    return sum(
        min(k, len(passage) - k * chunk) if shown else 1
        for passage, chunks in zip(passages, mask, strict=True)
        for chunk, shown in enumerate(chunks)
    )


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=5),
    st.integers(1, 9),
    st.floats(1.0, 9.0),
    st.randoms(use_true_random=False),
)
def test_a_budget_is_kept_and_filled(passages: list[list[int]], k: int, rate: float, random: Random) -> None:
    order = all_places(passages, k)
    random.shuffle(order)
    mask = fill_budget(passages, k, rate, order)
    used = slots(passages, mask, k)
    least = slots(passages, constant_mask(passages, k, False), k)
    budget = int(sum(map(len, passages)) / rate)
    assert used <= max(budget, least)
    shown = [bool(mask[p][c]) for p, c in order]
    assert shown == sorted(shown, reverse=True)  # as serving: it ends at the first that does not fit
    if used < budget and not all(shown):
        p, c = order[shown.index(False)]
        assert min(k, len(passages[p]) - k * c) - 1 > budget - used


def test_everything_fits_at_rate_one() -> None:
    mask = fill_budget(PASSAGES, 4, 1.0, all_places(PASSAGES, 4))
    assert all(chunks.all() for chunks in mask)


def test_an_answer_is_looked_for_in_the_passage_that_the_question_names() -> None:
    branch = Branch([99, 40, 41], [5, 6, 2])  # the last token ends the answer
    assert passage_ranking(PASSAGES, branch.prompt)[0] == 2
    assert answer_places(PASSAGES, branch, 4) == [(2, 1)]
    assert answer_places(PASSAGES, Branch([99, 3], [5, 6, 2]), 4) == [(0, 1)]
    assert answer_places(PASSAGES, Branch([99], [31, 41, 2]), 4) == []


def test_an_answer_may_stand_in_two_chunks() -> None:
    assert answer_places(PASSAGES, Branch([99], [4, 5, 2]), 4) == [(0, 0), (0, 1)]


def test_the_questions_order_opens_the_best_passage_whole() -> None:
    assert question_order(PASSAGES, Branch([99, 30, 33], []), 4)[:2] == [(1, 0), (1, 1)]


def test_drawn_masks_mostly_show_the_answer_and_depend_on_the_seed_alone() -> None:
    sampler = MaskSampler(2, 0.2)
    passages = [[1, *range(10 * n, 10 * n + 30)] for n in range(1, 9)]
    branch = Branch([33, 35], [36, 37, 2])
    (passage, chunk), *_ = answer_places(passages, branch, 2)
    draws = [sampler.draw(passages, [branch], Random(seed)) for seed in range(300)]
    shown = sum(bool(mask[passage][chunk]) for mask in draws) / len(draws)
    open_all = sum(all(chunks.all() for chunks in mask) for mask in draws) / len(draws)
    closed = sum(not any(chunks.any() for chunks in mask) for mask in draws) / len(draws)
    assert 0.65 < shown < 0.95
    assert open_all == pytest.approx(0.2, abs=0.07)
    assert 0.01 < closed < 0.2
    again = sampler.draw(passages, [branch], Random(7))
    assert all((a == b).all() for a, b in zip(draws[7], again, strict=True))
