"""Metrics of a ranking with binary relevance (Manning, Raghavan, Schütze, Introduction to Information Retrieval, 8.4).

``ranking`` is best first and without repetitions, ``relevant`` is not empty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


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
