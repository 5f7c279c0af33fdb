"""Reciprocal rank fusion (Cormack, Clarke, Büttcher, SIGIR 2009), with each text once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockrag.results import PassageHolder
from blockrag.retriever import payload as fields
from blockrag.retriever.vector_index import Document


@dataclass(frozen=True)
class Candidate:
    """A passage that one of the searches found."""

    point: str
    """Id of the point that holds it."""
    passage_id: str
    document_id: str
    commit: str
    digest: str
    """Equal for equal texts."""
    score: float


FOUND_FIELDS = [fields.PASSAGE_ID, fields.DOCUMENT_ID, fields.COMMIT, fields.DIGEST]
"""What a search reads of a point's payload."""
HELD_FIELDS = [*FOUND_FIELDS, fields.TITLE]
"""What is read of the passages that may hold a found text too."""


def candidate_of(point: str, payload: Mapping[str, Any], score: float) -> Candidate:
    """A found point, with ``FOUND_FIELDS`` of its payload."""
    passage_id, document_id, commit, digest = (payload[name] for name in FOUND_FIELDS)
    return Candidate(point, passage_id, document_id, commit, digest, score)


def fuse_texts(searches: Sequence[Sequence[Candidate]], rrf_k: int) -> list[tuple[Candidate, float]]:
    """Fuses what several searches found, each text once, with its score: best first.

    Of passages with equal texts the one that a search put first stands for all; those behind it take no place.
    """
    rankings: list[list[str]] = []
    standing: dict[str, Candidate] = {}
    for found in searches:
        ranking: dict[str, None] = {}
        # Equal scores by id, so that an engine's own order of ties does not matter.
        for candidate in sorted(found, key=lambda one: (-one.score, one.passage_id)):
            ranking.setdefault(candidate.digest)
            standing.setdefault(candidate.digest, candidate)
        rankings.append(list(ranking))
    return [(standing[item], score) for item, score in reciprocal_rank_fusion(rankings, rrf_k)]


def holders_of(
    held: Iterable[Mapping[str, Any]], documents: Iterable[Document], best: Sequence[Candidate]
) -> dict[str, tuple[PassageHolder, ...]]:
    """Of each text, by its digest, the documents that hold it besides the one that stands for it, by id.

    ``held``: ``HELD_FIELDS`` of the passages that have one of these texts; ``documents``: theirs, as they are shown.
    """
    standing = {one.digest: one.document_id for one in best}
    commits = {document.commit for document in documents}
    shown = (payload for payload in held if payload[fields.COMMIT] in commits)
    found: dict[str, dict[str, PassageHolder]] = {}
    for payload in sorted(shown, key=lambda payload: (payload[fields.DOCUMENT_ID], payload[fields.PASSAGE_ID])):
        digest, document_id = payload[fields.DIGEST], payload[fields.DOCUMENT_ID]
        if document_id != standing[digest]:
            holder = PassageHolder(payload[fields.PASSAGE_ID], document_id, payload[fields.TITLE])
            found.setdefault(digest, {}).setdefault(document_id, holder)
    return {digest: tuple(holders.values()) for digest, holders in found.items()}


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], rrf_k: int) -> list[tuple[str, float]]:
    """Fuses rankings, each best first and without repetitions: items with their scores, best first.

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
    return [(item, scores[item]) for item in order]
