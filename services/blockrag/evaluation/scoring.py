"""Metrics of answers and rankings, and bootstrap intervals of their means.

Of answers: exact match and F1 as SQuAD 1.1 defines them (arXiv 1606.05250), and containment.

Containment, a normalised gold answer being part of the normalised output, is what Block-Attention reports (arXiv
2409.15355, section 3.4).

Metrics of a ranking have binary relevance (Manning, Raghavan, Schütze, Introduction to Information Retrieval, 8.4);
``ranking`` is best first and without repetitions, ``relevant`` is not empty.

Intervals are over questions, by the percentile method, seeded, vectorised (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, sections 13.3 and, for paired data, whose values of one question are drawn together, 8.3).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces, in the order of SQuAD's script."""
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals one of ``answers`` after normalisation."""
    return any(normalize(prediction) == normalize(answer) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Highest harmonic mean of word precision and recall over ``answers``; 0 without answers."""
    return max((_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers), default=0.0)


def contains(prediction: str, answers: Sequence[str]) -> bool:
    """Whether one of ``answers`` occurs in the prediction, both normalised; an empty answer never does."""
    output = normalize(prediction)
    return any(answer and answer in output for answer in map(normalize, answers))


def _f1(prediction: list[str], answer: list[str]) -> float:
    # Without words there is no overlap to measure; SQuAD 2.0's script defines the two cases.
    if not prediction or not answer:
        return float(prediction == answer)
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def recall(ranking: Sequence[int], relevant: Collection[int], k: int) -> float:
    """Share of the relevant items among the first ``k``."""
    return len(set(ranking[:k]) & set(relevant)) / len(relevant)


def reciprocal_rank(ranking: Sequence[int], relevant: Collection[int]) -> float:
    """1 / place of the first relevant item; 0 where the ranking holds none."""
    return next((1 / place for place, item in enumerate(ranking, 1) if item in relevant), 0.0)


def ndcg(ranking: Sequence[int], relevant: Collection[int], k: int) -> float:
    """Discounted gain of the first ``k`` over the best possible one (Järvelin and Kekäläinen, 2002; log2 discount)."""
    gain = sum(1 / math.log2(place + 1) for place, item in enumerate(ranking[:k], 1) if item in relevant)
    best = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(relevant)) + 1))
    return gain / best


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

    def __format__(self, spec: str) -> str:
        """``{mean} ({low} to {high})``, each as a number of this format."""
        return f"{self.mean:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def bootstrap(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of ``values`` [questions] and its interval. Raises ValueError without values."""
    sample = _column(values)
    means = _resampled_means(sample[:, None], seed, resamples)[:, 0]
    return _interval(float(sample.mean()), means)


def bootstrap_difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Interval:
    """Mean of ``first - second``, both [questions] over the same questions, with the interval of paired draws."""
    one, other = _column(first), _column(second)
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} and {len(other)} values: paired values are of the same questions")
    return bootstrap(one - other, seed)


def bootstrap_ratio(numerators: ArrayLike, denominators: ArrayLike, seed: int = 0) -> Interval | None:
    """``sum(numerators) / sum(denominators)``, both [questions]; None where the denominators' sum is 0.

    Resamples whose denominator is 0 are left out of the quantiles: the ratio is undefined there.
    """
    above, below = _column(numerators), _column(denominators)
    if above.shape != below.shape:
        raise ValueError(f"{len(above)} numerators and {len(below)} denominators")
    if below.sum() == 0:
        return None
    sums = _resampled_means(np.stack([above, below], axis=1), seed, RESAMPLES)
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
