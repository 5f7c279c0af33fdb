import pytest

from blockrag.training.optimizer import learning_rate_factor


def test_the_learning_rate_warms_up_and_falls() -> None:
    assert learning_rate_factor(0, 0.0, 10) == pytest.approx(0.1)
    assert learning_rate_factor(9, 0.0, 10) == pytest.approx(1.0)
    assert learning_rate_factor(500, 1.0, 10) == pytest.approx(0.03)
