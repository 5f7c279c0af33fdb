"""Metrics of answers: exact match and F1 as SQuAD 1.1 defines them (arXiv 1606.05250), and containment.

Containment, a normalised gold answer being part of the normalised output, is what Block-Attention reports
(arXiv 2409.15355, section 3.4).

Metrics of a ranking have binary relevance (Manning, Raghavan, Schütze, Introduction to Information Retrieval, 8.4);
``ranking`` is best first and without repetitions, ``relevant`` is not empty.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

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
