import math

import numpy as np
import pytest

from blockrag.evaluation.scoring import bootstrap, bootstrap_difference, bootstrap_ratio


def test_interval_of_a_share_is_the_binomial_one() -> None:
    # The bootstrap of n flags of which a share p is set is binomial: mean p, standard error sqrt(p (1 - p) / n).
    values = np.array([1.0] * 300 + [0.0] * 700)
    interval = bootstrap(values, seed=1, resamples=20_000)
    error = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert interval.mean == 0.3
    assert interval.low == pytest.approx(0.3 - error, abs=0.002)
    assert interval.high == pytest.approx(0.3 + error, abs=0.002)


def test_every_resample_of_two_values() -> None:
    # Means of two draws from {0, 1} are 0, 1/2, 1/2, 1: the percentiles are the ends.
    assert (bootstrap([0.0, 1.0]).low, bootstrap([0.0, 1.0]).high) == (0.0, 1.0)


def test_resampling_in_parts_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    whole = bootstrap(values, seed=4)
    monkeypatch.setattr("blockrag.evaluation.scoring._DRAWN_AT_ONCE", 1000)
    assert bootstrap(values, seed=4) == whole


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=400)
    second = first - 0.1 + generator.normal(scale=0.01, size=400)
    paired = bootstrap_difference(first, second)
    assert paired.mean == pytest.approx(0.1, abs=0.002)
    assert 0.098 < paired.low < paired.high < 0.102
    assert bootstrap(first).high - bootstrap(first).low > 0.15


def test_equal_answers_differ_by_nothing() -> None:
    interval = bootstrap_difference([1, 0, 1], [1, 0, 1])
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_ratio() -> None:
    absent = np.array([1.0] * 60 + [0.0] * 40)
    present = np.array([0.0] * 80 + [1.0] * 20)
    ratio = bootstrap_ratio(absent, absent + present, seed=2)
    assert ratio is not None
    assert ratio.mean == 0.75
    # Delta method for a ratio of means over the same questions.
    share, total = absent, absent + present
    residual = (share - 0.75 * total) / total.mean()
    error = 1.96 * residual.std() / 10
    assert ratio.low == pytest.approx(0.75 - error, abs=0.02)
    assert ratio.high == pytest.approx(0.75 + error, abs=0.02)


def test_ratio_of_nothing_is_undefined() -> None:
    assert bootstrap_ratio([0.0, 0.0], [0.0, 0.0]) is None
    rare = bootstrap_ratio([1.0, *[0.0] * 9], [1.0, *[0.0] * 9])
    assert rare is not None and (rare.low, rare.high) == (1.0, 1.0)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
    with pytest.raises(ValueError, match="same questions"):
        bootstrap_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="denominators"):
        bootstrap_ratio([1.0], [1.0, 0.0])
