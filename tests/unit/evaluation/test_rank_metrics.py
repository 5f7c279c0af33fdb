import math

import pytest

from blockrag.evaluation.rank_metrics import ndcg, recall, reciprocal_rank


def test_recall_counts_the_relevant_ones_among_the_first() -> None:
    assert recall([3, 1, 2], {1, 9}, 1) == 0.0
    assert recall([3, 1, 2], {1, 9}, 2) == 0.5
    assert recall([9, 1, 2], {1, 9}, 5) == 1.0


@pytest.mark.parametrize(("relevant", "value"), [({3}, 1.0), ({2, 1}, 0.5), ({2}, 1 / 3), ({9}, 0.0)])
def test_reciprocal_rank_of_the_first_relevant_one(relevant: set[int], value: float) -> None:
    assert reciprocal_rank([3, 1, 2], relevant) == value


def test_ndcg_of_a_known_ranking() -> None:
    # Gains 0 1 1 of two relevant: (1/log2(3) + 1/log2(4)) / (1 + 1/log2(3)).
    expected = (1 / math.log2(3) + 0.5) / (1 + 1 / math.log2(3))
    assert ndcg([7, 1, 2], {1, 2}, 3) == pytest.approx(expected)
    assert ndcg([1, 2, 7], {1, 2}, 3) == 1.0
    assert ndcg([1, 7, 8], {1, 2, 3, 4}, 1) == 1.0
    assert ndcg([7, 8], {1}, 2) == 0.0
