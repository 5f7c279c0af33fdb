"""Bootstrap intervals over questions: percentile method, seeded, vectorised.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 13.3 (percentile interval) and 8.3
(paired data: what belongs to one question is drawn together).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
_DRAWN_AT_ONCE = 4_000_000
_LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A mean over questions with its 95 % bootstrap interval."""

    mean: float
    low: float
    """2.5 % quantile of the bootstrap means."""
    high: float
    """97.5 % quantile of the bootstrap means."""


def bootstrap(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of ``values`` [questions] and its interval. Raises ValueError without values."""
    sample = _column(values)
    means = _resampled_means(sample[:, None], seed, resamples)[:, 0]
    return _interval(float(sample.mean()), means)


def bootstrap_difference(first: ArrayLike, second: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of ``first - second``, both [questions] over the same questions, with the interval of paired draws."""
    one, other = _column(first), _column(second)
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} and {len(other)} values: paired values are of the same questions")
    return bootstrap(one - other, seed, resamples)


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """``sum(numerators) / sum(denominators)``, both [questions]; None where the denominators' sum is 0.

    Resamples whose denominator is 0 are left out of the quantiles: the ratio is undefined there.
    """
    above, below = _column(numerators), _column(denominators)
    if above.shape != below.shape:
        raise ValueError(f"{len(above)} numerators and {len(below)} denominators")
    if below.sum() == 0:
        return None
    sums = _resampled_means(np.stack([above, below], axis=1), seed, resamples)
    defined = sums[sums[:, 1] != 0]
    return _interval(float(above.sum() / below.sum()), defined[:, 0] / defined[:, 1])


def _column(values: ArrayLike) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or column.size == 0:
        raise ValueError("the mean of no values is undefined")
    return column


def _resampled_means(values: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Means [resamples, k] of values [n, k] drawn with replacement; the k columns of a question stay together."""
    generator = np.random.default_rng(seed)
    count = len(values)
    at_once = max(1, _DRAWN_AT_ONCE // count)
    parts = [
        values[generator.integers(0, count, (min(at_once, resamples - start), count))].mean(axis=1)
        for start in range(0, resamples, at_once)
    ]
    return np.concatenate(parts)


def _interval(mean: float, means: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(means, _LEVELS)
    return Interval(mean, float(low), float(high))
