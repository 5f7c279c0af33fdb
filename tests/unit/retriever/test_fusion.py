"""Reciprocal rank fusion."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from blockrag.retriever.fusion import Candidate, fuse_texts, reciprocal_rank_fusion

items = st.text(alphabet="abcdefgh", min_size=1, max_size=2)
rankings = st.lists(st.lists(items, unique=True, max_size=12), min_size=1, max_size=4)


def test_scores_are_sums_of_reciprocal_places() -> None:
    fused = reciprocal_rank_fusion([["a", "b"], ["b", "c"]], rrf_k=60)

    assert [item for item, _ in fused] == ["b", "a", "c"]
    assert fused[0][1] == 1 / 62 + 1 / 61
    assert fused[1][1] == 1 / 61
    assert fused[2][1] == 1 / 62


def test_ties_go_to_the_first_ranking_then_to_the_smaller_item() -> None:
    assert [item for item, _ in reciprocal_rank_fusion([["b"], ["a"]], 60)] == ["b", "a"]
    assert [item for item, _ in reciprocal_rank_fusion([[], ["b"], ["a"]], 60)] == ["b", "a"]


def candidate(item: str, score: float, digest: str = "") -> Candidate:
    return Candidate(f"point of {item}", item, f"document of {item}", "commit", digest or item, score)


def test_equal_scores_rank_by_item() -> None:
    fused = fuse_texts([[candidate("b", 0.5), candidate("a", 0.5), candidate("c", 0.9)]], 60)
    assert [one.passage_id for one, _ in fused] == ["c", "a", "b"]


def test_equal_texts_take_one_place() -> None:
    """Row "six equal passages fill five places": what is behind them moves up."""
    equal = [candidate(f"copy {number}", 0.9, "same") for number in range(6)]
    fused = fuse_texts([[*equal, candidate("other", 0.5)], [candidate("other", 3.0), *equal]], 60)

    assert [(one.passage_id, score) for one, score in fused] == [
        ("copy 0", 1 / 61 + 1 / 62),
        ("other", 1 / 62 + 1 / 61),
    ]


@given(rankings, st.integers(1, 200))
def test_every_item_once_best_first(lists: list[list[str]], rrf_k: int) -> None:
    fused = reciprocal_rank_fusion(lists, rrf_k)

    assert sorted(item for item, _ in fused) == sorted({item for ranking in lists for item in ranking})
    assert all(first >= second for (_, first), (_, second) in itertools.pairwise(fused))
    for item, score in fused:
        places = [ranking.index(item) + 1 for ranking in lists if item in ranking]
        assert math.isclose(score, sum(1 / (rrf_k + place) for place in places))


@given(st.lists(items, unique=True, max_size=12), st.integers(1, 200))
def test_one_ranking_keeps_its_order(ranking: list[str], rrf_k: int) -> None:
    assert [item for item, _ in reciprocal_rank_fusion([ranking, []], rrf_k)] == ranking
    assert [item for item, _ in reciprocal_rank_fusion([ranking, ranking], rrf_k)] == ranking


@given(rankings, st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order_of_equal_scores(lists: list[list[str]], random: object) -> None:
    scored = [candidate(item, float(len(item))) for item in {item for ranking in lists for item in ranking}]
    shuffled = list(scored)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert fuse_texts([scored], 60) == fuse_texts([shuffled], 60)
