"""Conditions on the points of an embedded shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import qdrant_edge as qdrant

from blockrag.retriever import payload as fields
from blockrag.retriever.payload import AnyTerm, Condition
from blockrag.retriever.vector_index import Document


def visible(conditions: Sequence[Condition], *further: qdrant.FieldCondition) -> qdrant.Filter:
    """Passages that a commit showed and for which the conditions hold."""
    must: list[Any] = [equals(fields.STATE, fields.VISIBLE), *further]
    must_not: list[Any] = []
    for condition in conditions:
        if isinstance(condition, AnyTerm):
            clause = qdrant.FieldCondition(fields.TERMS, match=qdrant.MatchAny(list(condition.terms)))
            (must_not if condition.negated else must).append(clause)
        else:
            bounds = qdrant.RangeFloat(gte=condition.at_least, lte=condition.at_most)
            must.append(qdrant.FieldCondition(f"{fields.NUMBERS}.{condition.field}", range=bounds))
    return qdrant.Filter(must=must, must_not=must_not)


def of_version(document: Document) -> list[Any]:
    """Passages of a version, whatever their state."""
    return [equals(fields.DOCUMENT_ID, document.document_id), equals(fields.VERSION, document.version)]


def of_commit(commit: str) -> qdrant.Filter:
    """Passages that a commit showed."""
    return qdrant.Filter(must=[equals(fields.COMMIT, commit)])


def since(moment: float) -> qdrant.FieldCondition:
    """Passages that wait since before a moment, in seconds since 1970."""
    return qdrant.FieldCondition(fields.SINCE, range=qdrant.RangeFloat(lt=moment))


def equals(field: str, value: str) -> qdrant.FieldCondition:
    """A field's value is this one."""
    return qdrant.FieldCondition(field, match=qdrant.MatchValue(value))


def sparse(vector: Any) -> qdrant.SparseVector:
    """As the engine takes it."""
    return qdrant.SparseVector(list(vector.indices), list(vector.values))
