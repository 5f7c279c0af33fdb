"""Points of one Qdrant collection: what a ``ServerIndex`` reads and writes, each method one or few requests.

A change that depends on what is stored is a filter of the request itself (conditional updates, Qdrant 1.16 and later),
so it holds whatever other callers do meanwhile.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from qdrant_client import AsyncQdrantClient, models

from blockrag.bm25 import SparseVector
from blockrag.errors import InvalidRequestError, SettingsError
from blockrag.identity import CollectionId
from blockrag.retriever import payload as fields
from blockrag.retriever.fusion import FOUND_FIELDS, Candidate, candidate_of
from blockrag.retriever.payload import AnyTerm, Condition
from blockrag.retriever.vector_index import Document, EmbeddedPassage, SearchQuery

_PREFIX = "blockrag."
_NAMESPACE = uuid.UUID("b3c1d6de-52c7-5d0e-8f7f-9a1f6a3a2f11")
_SCROLL_LIMIT = 1000
_OLDEST_SERVER = (1, 16)
"""The first with conditional updates; an older one would ignore the condition."""
# The server tells nobody what a collection takes of its disk. Its own rule for vectors is 1.5 times four bytes.
_VECTOR_BYTES = 6
_PAYLOAD_BYTES = 2048
_NOTHING = "nothing"
"""The mark that no entry has: an entry conditional on it is written only where there is none."""

Payload = dict[str, Any]


def check_version(version: str, address: str) -> None:
    """Raises ``SettingsError`` for a server that would ignore the conditions of changes."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST_SERVER:
        oldest = ".".join(map(str, _OLDEST_SERVER))
        raise SettingsError(f"the Qdrant server at {address} is {version}; at least {oldest} is needed")


class Points:
    """The points of the Qdrant collection ``name``. Errors are the client's own."""

    def __init__(self, client: AsyncQdrantClient, name: str) -> None:
        self._client = client
        self._name = name

    async def put(self, passages: Sequence[EmbeddedPassage]) -> None:
        """Stores staged passages."""
        staged_at = time.time()
        points = [
            models.PointStruct(
                id=fields.new_point(),
                vector={fields.DENSE: item.dense.tolist(), fields.BM25: _sparse(item.sparse)},
                payload=fields.passage_payload(item.passage, staged_at),
            )
            for item in passages
        ]
        await self._client.upsert(self._name, points, wait=True)

    async def disk_bytes(self, dimensions: int) -> int:
        """About what all points take of the server's disk, with vectors of so many dimensions."""
        return await self.count(models.Filter()) * (_VECTOR_BYTES * dimensions + _PAYLOAD_BYTES)

    async def entries(self, document_ids: Iterable[str]) -> list[Document]:
        """The catalogue's entries of these documents, by id."""
        payloads = await self.load([_document_point(document_id) for document_id in sorted(set(document_ids))])
        return sorted(map(fields.document_of, payloads.values()), key=lambda document: document.document_id)

    async def entry(self, document_id: str) -> Document | None:
        """The catalogue's entry of a document."""
        found = await self.entries([document_id])
        return found[0] if found else None

    async def write_entry(self, document: Document, commit: str, expected: Document | None) -> None:
        """Makes ``commit`` the one that is shown, unless the entry has changed from ``expected``."""
        point = models.PointStruct(
            id=_document_point(document.document_id),
            vector={},
            payload=fields.document_payload(replace(document, commit=commit)),
        )
        unchanged = models.Filter(must=[equals(fields.COMMIT, expected.commit if expected else _NOTHING)])
        await self._client.upsert(self._name, [point], wait=True, update_filter=unchanged)

    async def remove_entry(self, document: Document) -> None:
        """Removes a document's entry, unless it has changed."""
        ids = models.HasIdCondition(has_id=[_document_point(document.document_id)])
        await self.delete(models.Filter(must=[ids, equals(fields.COMMIT, document.commit)]))

    async def mark(self, document: Document, commit: str) -> bool:
        """Marks one staged point for each place of a version as shown by ``commit``.

        False, with nothing changed, when another commit of the same version was faster. Raises
        ``InvalidRequestError`` when too few are staged.
        """
        staged = models.Filter(must=[*_of_version(document), equals(fields.STATE, fields.STAGED)])
        points = fields.one_for_each_place(await self.scroll(staged, [fields.ORDINAL]), document)
        shown = {fields.STATE: fields.VISIBLE, fields.COMMIT: commit, fields.SINCE: time.time()}
        # Every caller goes through them in the same order: whoever misses one of the first misses all.
        for start in range(0, len(points), _SCROLL_LIMIT):
            part = points[start : start + _SCROLL_LIMIT]
            still: list[models.Condition] = [
                models.HasIdCondition(has_id=list(part)),
                equals(fields.STATE, fields.STAGED),
            ]
            await self.set(shown, models.Filter(must=still))
            if await self.count(of_commit(commit)) < start + len(part):
                await self.set({fields.STATE: fields.STAGED, fields.COMMIT: ""}, of_commit(commit))
                return False
        return True

    async def set(self, values: Payload, condition: models.Filter) -> None:
        """Sets fields of the points that fit."""
        await self._client.set_payload(self._name, values, points=condition, wait=True)

    async def settle(self, commit: str) -> None:
        """Says that a commit's passages are no longer on their way in or out."""
        await self._client.delete_payload(self._name, [fields.SINCE], points=of_commit(commit), wait=True)

    async def delete(self, condition: models.Filter) -> None:
        """Removes the points that fit."""
        await self._client.delete(self._name, models.FilterSelector(filter=condition), wait=True)

    async def count(self, condition: models.Filter) -> int:
        """How many points fit."""
        return (await self._client.count(self._name, count_filter=condition, exact=True)).count

    async def scroll(
        self, condition: models.Filter, payload: bool | list[str], most: int | None = None
    ) -> list[tuple[str, Payload]]:
        """Points that fit, with their payloads."""
        found: list[tuple[str, Payload]] = []
        offset: Any = None
        while True:
            records, offset = await self._client.scroll(
                self._name, scroll_filter=condition, limit=_SCROLL_LIMIT, offset=offset, with_payload=payload
            )
            found += [(str(record.id), record.payload or {}) for record in records]
            if offset is None or (most is not None and len(found) >= most):
                return found

    async def load(self, point_ids: Sequence[str]) -> dict[str, Payload]:
        """Payloads of points; those that are gone are left out."""
        records = await self._client.retrieve(self._name, list(point_ids), with_payload=True) if point_ids else []
        return {str(record.id): record.payload or {} for record in records}

    async def search(self, query: SearchQuery, candidates: int, without: Collection[str]) -> list[list[Candidate]]:
        """What the dense search and BM25 find among visible passages, except for those of the commits ``without``."""
        condition = visible(query.conditions, without)
        requests = []
        if query.dense is not None:
            requests.append(_request(query.dense.tolist(), fields.DENSE, candidates, condition))
        if query.sparse.indices:
            requests.append(_request(_sparse(query.sparse), fields.BM25, candidates, condition))
        answers = await self._client.query_batch_points(self._name, requests)
        return [
            [candidate_of(str(point.id), point.payload or {}, point.score) for point in answer.points]
            for answer in answers
        ]


def _document_point(document_id: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "document:" + document_id))


MODEL_POINT = str(uuid.uuid5(_NAMESPACE, "model"))


def _request(vector: Any, using: str, limit: int, condition: models.Filter) -> models.QueryRequest:
    return models.QueryRequest(query=vector, using=using, filter=condition, limit=limit, with_payload=FOUND_FIELDS)


def visible(conditions: Sequence[Condition], without: Collection[str] = ()) -> models.Filter:
    """Passages that a commit showed and for which the conditions hold."""
    must: list[models.Condition] = [equals(fields.STATE, fields.VISIBLE)]
    must_not: list[models.Condition] = []
    if without:
        must_not.append(any_of(fields.COMMIT, sorted(without)))
    for condition in conditions:
        if isinstance(condition, AnyTerm):
            (must_not if condition.negated else must).append(any_of(fields.TERMS, condition.terms))
        else:
            bounds = models.Range(gte=condition.at_least, lte=condition.at_most)
            must.append(models.FieldCondition(key=f"{fields.NUMBERS}.{condition.field}", range=bounds))
    return models.Filter(must=must, must_not=must_not)


def _of_version(document: Document) -> list[models.Condition]:
    return [equals(fields.DOCUMENT_ID, document.document_id), equals(fields.VERSION, document.version)]


def of_commit(commit: str) -> models.Filter:
    """Passages that a commit showed."""
    return models.Filter(must=[equals(fields.STATE, fields.VISIBLE), equals(fields.COMMIT, commit)])


def states(state: str) -> models.Filter:
    """Points of a kind."""
    return models.Filter(must=[equals(fields.STATE, state)])


def settled() -> models.Filter:
    """Visible passages that are not on their way in or out."""
    empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=fields.SINCE))
    return models.Filter(must=[equals(fields.STATE, fields.VISIBLE), empty])


def waiting(state: str, since: float, document_id: str = "") -> models.Filter:
    """Passages, of a document or of all, that wait longer than ``since``, in seconds since 1970."""
    must: list[models.Condition] = [
        equals(fields.STATE, state),
        models.FieldCondition(key=fields.SINCE, range=models.Range(lt=since)),
    ]
    return models.Filter(must=[*must, equals(fields.DOCUMENT_ID, document_id)] if document_id else must)


def equals(field: str, value: str) -> models.FieldCondition:
    """A field's value is this one."""
    return models.FieldCondition(key=field, match=models.MatchValue(value=value))


def any_of(field: str, values: Sequence[str]) -> models.FieldCondition:
    """A field's value is one of these."""
    return models.FieldCondition(key=field, match=models.MatchAny(any=list(values)))


def _sparse(vector: SparseVector) -> models.SparseVector:
    return models.SparseVector(indices=list(vector.indices), values=list(vector.values))


def collection_name(collection: CollectionId) -> str:
    """Its name on the server."""
    # A tenant's name has no dot, so the first one ends it.
    return f"{_PREFIX}{collection.tenant}.{collection.name}"


def identity_of(name: str) -> CollectionId | None:
    """The collection that has this name on the server; None: another program's."""
    if not name.startswith(_PREFIX):
        return None
    tenant, _, collection = name.removeprefix(_PREFIX).partition(".")
    try:
        return CollectionId(tenant, collection)
    except InvalidRequestError:
        return None
