"""Values are those of the SQuAD 1.1 and 2.0 evaluation scripts on the same strings."""

import pytest

from blockrag.evaluation.metrics import contains, exact_match, f1, normalize


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
