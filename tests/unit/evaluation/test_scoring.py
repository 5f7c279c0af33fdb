"""Values are those of the SQuAD 1.1 and 2.0 evaluation scripts on the same strings."""

import math

import pytest

from blockrag.evaluation.scoring import contains, exact_match, f1, ndcg, normalize, recall, reciprocal_rank


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an  apple,\n a day", "apple day"),
        ("U.S.A.", "usa"),
        ("12,800,", "12800"),
        ("theatre", "theatre"),
        ("The", ""),
    ],
)
def test_normalize(text: str, normalized: str) -> None:
    assert normalize(text) == normalized


def test_exact_match_takes_any_answer() -> None:
    # The three answers given by people to SQuAD's question on where Super Bowl 50 took place.
    answers = ["Santa Clara, California", "Levi's Stadium", "Levi's Stadium in the San Francisco Bay Area"]
    assert exact_match("levis stadium", answers)
    assert exact_match("the Levi's Stadium.", answers)
    assert not exact_match("San Francisco", answers)
    assert not exact_match("anything", [])


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1.0),
        ("the Broncos", ["Denver Broncos"], 2 / 3),
        ("Levi's Stadium in Santa Clara", ["Levi's Stadium", "Santa Clara, California"], 4 / 7),
        ("gold gold", ["gold"], 2 / 3),
        ("Carolina Panthers", ["Denver Broncos"], 0.0),
        ("", ["Denver Broncos"], 0.0),
        ("", ["the"], 1.0),
        ("x", [], 0.0),
    ],
)
def test_f1(prediction: str, answers: list[str], value: float) -> None:
    assert f1(prediction, answers) == pytest.approx(value)


def test_contains() -> None:
    assert contains("It was the Denver Broncos who won.", ["Denver Broncos"])
    assert not contains("Denver", ["Denver Broncos"])
    assert not contains("anything", ["the", ""])


def test_published_example() -> None:
    """The partial match of the metric card of Hugging Face's ``squad``, which wraps the official script: 66.67 both."""
    pairs = [
        ("1976", ["1976"]),
        ("Beyonce", ["Beyoncé and Bruno Mars"]),
        ("climate change", ["climate change"]),
    ]
    assert 100 * sum(exact_match(*pair) for pair in pairs) / 3 == pytest.approx(66.66666666666667)
    assert 100 * sum(f1(*pair) for pair in pairs) / 3 == pytest.approx(66.66666666666667)


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
