"""Reciprocal rank fusion (Cormack, Clarke, Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """One item of a fused list."""

    item: str
    score: float


def rank(scored: Iterable[tuple[str, float]]) -> list[str]:
    """Items by descending score; equal scores by item, so that an engine's own order of ties does not matter."""
    return [item for item, _ in sorted(scored, key=lambda pair: (-pair[1], pair[0]))]


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], rrf_k: int) -> list[Fused]:
    """Fuses rankings, each best first and without repetitions.

    An item's score is the sum over the rankings that hold it of ``1 / (rrf_k + place)``, places from 1. Ties: the
    item that stands earlier in the first ranking, then in the second, …, then the smaller item.
    """
    scores: dict[str, float] = {}
    places: dict[str, list[int]] = {}
    for number, ranking in enumerate(rankings):
        for place, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (rrf_k + place)
            places.setdefault(item, [len(ranking) + 1 for ranking in rankings])[number] = place
    order = sorted(scores, key=lambda item: (-scores[item], places[item], item))
    return [Fused(item, scores[item]) for item in order]
