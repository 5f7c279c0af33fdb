"""A Qdrant server as a ``VectorIndex``: one Qdrant collection for each collection, the catalogue as points in it.

Several replicas may share a server, so nothing is kept in this process. The catalogue's entry of a document is a
point without vectors; writing it is the step that switches versions, and whatever a search finds is checked against
it. So a replica that dies between two steps of a commit leaves nothing wrong in sight.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from blockrag.errors import InvalidRequestError, NotFoundError, SettingsError, UnavailableError
from blockrag.retriever import payload as fields
from blockrag.retriever.base import (
    STAGED_FOR_S,
    Counts,
    Document,
    EmbeddedPassage,
    EmbeddingInfo,
    FoundPassage,
    Passage,
    Replaced,
    SearchQuery,
    SparseVector,
    VectorIndex,
    too_few_staged,
    unknown_collection,
    unknown_document,
)
from blockrag.retriever.filters import AnyTerm, Condition
from blockrag.retriever.fusion import Fused, rank, reciprocal_rank_fusion
from blockrag.retriever.identity import CollectionId

_PREFIX = "blockrag."
_NAMESPACE = uuid.UUID("b3c1d6de-52c7-5d0e-8f7f-9a1f6a3a2f11")
_TIMEOUT_S = 30
_STALE_STAGED_S = 3600
_SCROLL_LIMIT = 1000
_HTTP_NOT_FOUND = 404
_HTTP_CONFLICT = 409
_HTTP_REFUSED = (401, 403)


class ServerIndex(VectorIndex):
    """Collections of one Qdrant server."""

    def __init__(self, client: AsyncQdrantClient, embedding: EmbeddingInfo, address: str) -> None:
        """``address`` names the server in errors."""
        self._client = client
        self._embedding = embedding
        self._address = address
        self._checked: set[str] = set()

    @classmethod
    def connect(cls, url: str, api_key: str, embedding: EmbeddingInfo) -> ServerIndex:
        """Connects when first used."""
        with warnings.catch_warnings():
            # Inside a cluster a key over plain HTTP is usual; TLS is the operator's choice by the URL.
            warnings.filterwarnings("ignore", message="Api key is used with an insecure connection")
            client = AsyncQdrantClient(url=url, api_key=api_key or None, timeout=_TIMEOUT_S, check_compatibility=False)
        return cls(client, embedding, url)

    async def stage(self, collection: CollectionId, passages: Sequence[EmbeddedPassage]) -> None:
        try:
            await self._stage(collection, passages)
        except NotFoundError:
            # Another replica removed the collection that this one had seen.
            await self._stage(collection, passages)

    async def commit(self, collection: CollectionId, document: Document) -> Replaced:
        name = _name(collection)
        try:
            with self._translated(collection):
                return await self._commit(name, document)
        except NotFoundError:
            raise InvalidRequestError("passages", too_few_staged(0, document)) from None

    async def remove_document(self, collection: CollectionId, document_id: str) -> int:
        name = _name(collection)
        with self._translated(collection):
            current = await self._find(name, [document_id])
            await self._client.delete(name, models.PointIdsList(points=[_document_point(document_id)]), wait=True)
            of_document = models.Filter(must=[_equals(fields.DOCUMENT_ID, document_id)])
            if not current and not await self._count(name, of_document):
                raise NotFoundError(unknown_document(collection, document_id))
            await self._client.delete(name, models.FilterSelector(filter=of_document), wait=True)
            return current[0].passages if current else 0

    async def remove_collection(self, collection: CollectionId) -> Counts:
        name = _name(collection)
        counts = await self.counts(collection)
        with self._translated(collection):
            self._checked.discard(name)
            if not await self._client.delete_collection(name):
                raise NotFoundError(unknown_collection(collection))
        return counts

    async def search(self, collection: CollectionId, query: SearchQuery) -> list[FoundPassage]:
        name = _name(collection)
        condition = _filter(query.conditions)
        requests = []
        if query.dense is not None:
            requests.append(_request(query.dense.tolist(), fields.DENSE, query, condition))
        if query.sparse.indices:
            requests.append(_request(_sparse(query.sparse), fields.BM25, query, condition))
        with self._translated(collection):
            await self._check(name)
            results = await self._client.query_batch_points(name, requests)
            rankings = [rank((str(point.id), point.score) for point in result.points) for result in results]
            fused = reciprocal_rank_fusion(rankings, query.rrf_k)
            return await self._load(name, fused, query.limit)

    async def documents(self, collection: CollectionId, after: str, limit: int) -> list[Document]:
        name = _name(collection)
        with self._translated(collection):
            # The server cannot order by a string: the ids are sorted here, the page is then read by id.
            entries = await self._scroll(name, _states(fields.DOCUMENT), [fields.DOCUMENT_ID])
            ids = sorted(payload[fields.DOCUMENT_ID] for _, payload in entries)
            return await self._find(name, [document_id for document_id in ids if document_id > after][:limit])

    async def find_documents(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Document]:
        name = _name(collection)
        with self._translated(collection):
            if not document_ids:
                await self._client.get_collection(name)
            return await self._find(name, document_ids)

    async def passages(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Passage]:
        name = _name(collection)
        found: list[Passage] = []
        with self._translated(collection):
            for document in await self._find(name, document_ids):
                entries = await self._scroll(name, _of_version(document), True)
                passages = [fields.passage_of(point_id, payload) for point_id, payload in entries]
                found += sorted(passages, key=lambda passage: passage.ordinal)
        return found

    async def counts(self, collection: CollectionId) -> Counts:
        name = _name(collection)
        with self._translated(collection):
            return Counts(
                documents=await self._count(name, _states(fields.DOCUMENT)),
                passages=await self._count(name, _states(fields.VISIBLE)),
            )

    async def collections(self, tenant: str | None) -> list[CollectionId]:
        with self._translated(None):
            answer = await self._client.get_collections()
        identities = [_identity(item.name) for item in answer.collections if item.name.startswith(_PREFIX)]
        return sorted(identity for identity in identities if identity and tenant in (None, identity.tenant))

    async def sweep(self, older_than_s: float = STAGED_FOR_S) -> None:
        stale = models.Filter(must=[_equals(fields.STATE, fields.STAGED), _staged_before(time.time() - older_than_s)])
        for collection in await self.collections(None):
            with self._translated(collection):
                await self._client.delete(_name(collection), models.FilterSelector(filter=stale), wait=True)

    async def close(self) -> None:
        await self._client.close()

    async def _stage(self, collection: CollectionId, passages: Sequence[EmbeddedPassage]) -> None:
        name = _name(collection)
        with self._translated(collection):
            await self._ensure(name)
            first = passages[0].passage
            current = await self._find(name, [first.document_id])
            if current and current[0].version == first.version:
                return
            staged_at = time.time()
            points = [
                models.PointStruct(
                    id=item.passage.passage_id,
                    vector={fields.DENSE: item.dense.tolist(), fields.BM25: _sparse(item.sparse)},
                    payload=fields.passage_payload(item.passage, staged_at),
                )
                for item in passages
            ]
            await self._client.upsert(name, points, wait=True)

    async def _commit(self, name: str, document: Document) -> Replaced:
        found = await self._find(name, [document.document_id])
        current = found[0] if found else None
        if current is not None and current.version == document.version:
            return Replaced("", 0)
        complete = _of_version(document, models.Range(lt=document.passages))
        staged = await self._count(name, complete)
        if staged < document.passages:
            raise InvalidRequestError("passages", too_few_staged(staged, document))
        await self._client.set_payload(name, {fields.STATE: fields.VISIBLE}, points=complete, wait=True)
        await self._client.upsert(name, [_entry(document)], wait=True)
        replaced = current.version if current else ""
        # Another version that is being staged right now, perhaps by another replica, stays.
        older = models.Filter(
            must=[_equals(fields.DOCUMENT_ID, document.document_id)],
            should=[_equals(fields.VERSION, replaced), _staged_before(time.time() - _STALE_STAGED_S)],
            must_not=[_equals(fields.VERSION, document.version)],
        )
        await self._client.delete(name, models.FilterSelector(filter=older), wait=True)
        beyond = _of_version(document, models.Range(gte=document.passages))
        await self._client.delete(name, models.FilterSelector(filter=beyond), wait=True)
        return Replaced(replaced, current.passages if current else 0)

    async def _load(self, name: str, fused: Sequence[Fused], limit: int) -> list[FoundPassage]:
        """The best ``limit`` passages whose version is the visible one."""
        found: list[FoundPassage] = []
        for start in range(0, len(fused), limit):
            part = fused[start : start + limit]
            records = await self._client.retrieve(name, [item.item for item in part], with_payload=True)
            passages = {str(record.id): fields.passage_of(record.id, record.payload or {}) for record in records}
            documents = await self._find(name, [passage.document_id for passage in passages.values()])
            versions = {document.document_id: document.version for document in documents}
            for item in part:
                passage = passages.get(item.item)
                if passage is not None and versions.get(passage.document_id) == passage.version:
                    found.append(FoundPassage(passage, item.score))
            if len(found) >= limit:
                break
        return found[:limit]

    async def _find(self, name: str, document_ids: Sequence[str]) -> list[Document]:
        ids = [_document_point(document_id) for document_id in sorted(set(document_ids))]
        if not ids:
            return []
        records = await self._client.retrieve(name, ids, with_payload=True)
        return sorted(
            (fields.document_of(record.payload or {}) for record in records),
            key=lambda document: document.document_id,
        )

    async def _scroll(
        self, name: str, condition: models.Filter, payload: bool | list[str]
    ) -> list[tuple[object, dict[str, Any]]]:
        found: list[tuple[object, dict[str, Any]]] = []
        offset: Any = None
        while True:
            records, offset = await self._client.scroll(
                name, scroll_filter=condition, limit=_SCROLL_LIMIT, offset=offset, with_payload=payload
            )
            found += [(record.id, record.payload or {}) for record in records]
            if offset is None:
                return found

    async def _count(self, name: str, condition: models.Filter) -> int:
        return (await self._client.count(name, count_filter=condition, exact=True)).count

    async def _ensure(self, name: str) -> None:
        """Makes the collection when it is missing."""
        if name in self._checked:
            return
        if not await self._client.collection_exists(name):
            vectors = models.VectorParams(size=self._embedding.dimensions, distance=models.Distance.COSINE)
            sparse = models.SparseVectorParams(modifier=models.Modifier.IDF)
            try:
                await self._client.create_collection(
                    name, vectors_config={fields.DENSE: vectors}, sparse_vectors_config={fields.BM25: sparse}
                )
            except (UnexpectedResponse, ValueError) as error:
                # Another replica may have been faster.
                if getattr(error, "status_code", _HTTP_CONFLICT) != _HTTP_CONFLICT:
                    raise
        for field in fields.KEYWORD_FIELDS:
            await self._client.create_payload_index(name, field, models.PayloadSchemaType.KEYWORD, wait=True)
        if not await self._client.retrieve(name, [_MODEL_POINT]):
            payload = {fields.STATE: fields.MODEL, "fingerprint": self._embedding.fingerprint}
            await self._client.upsert(name, [models.PointStruct(id=_MODEL_POINT, vector={}, payload=payload)])
        await self._check(name)

    async def _check(self, name: str) -> None:
        """Refuses a collection whose vectors another model made."""
        if name in self._checked:
            return
        records = await self._client.retrieve(name, [_MODEL_POINT], with_payload=True)
        stored = (records[0].payload or {}).get("fingerprint") if records else self._embedding.fingerprint
        if stored != self._embedding.fingerprint:
            raise SettingsError(
                f"collection {name} at {self._address} does not fit: its embedding model is {stored!r}, not"
                f" {self._embedding.fingerprint!r}; delete it and ingest again, or go back to the old setting"
            )
        self._checked.add(name)

    @contextmanager
    def _translated(self, collection: CollectionId | None) -> Iterator[None]:
        try:
            yield
        except UnexpectedResponse as error:
            if error.status_code == _HTTP_NOT_FOUND and collection is not None:
                self._checked.discard(_name(collection))
                raise NotFoundError(unknown_collection(collection)) from error
            if error.status_code in _HTTP_REFUSED:
                raise UnavailableError(f"the vector store at {self._address} refuses the API key") from error
            raise UnavailableError(f"the vector store at {self._address} failed: {str(error)[:500]}") from error
        except (ResponseHandlingException, ApiException, OSError) as error:
            raise UnavailableError(f"the vector store at {self._address} cannot be reached: {error}") from error
        except ValueError as error:
            # What the client's in-memory stand-in raises where the server answers 404.
            if collection is not None and str(error).endswith("not found"):
                self._checked.discard(_name(collection))
                raise NotFoundError(unknown_collection(collection)) from error
            raise


def _name(collection: CollectionId) -> str:
    # A tenant's name has no dot, so the first one ends it.
    return f"{_PREFIX}{collection.tenant}.{collection.name}"


def _identity(name: str) -> CollectionId | None:
    tenant, _, collection = name.removeprefix(_PREFIX).partition(".")
    try:
        return CollectionId(tenant, collection)
    except InvalidRequestError:
        return None


def _document_point(document_id: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "document:" + document_id))


_MODEL_POINT = str(uuid.uuid5(_NAMESPACE, "model"))


def _entry(document: Document) -> models.PointStruct:
    point_id = _document_point(document.document_id)
    return models.PointStruct(id=point_id, vector={}, payload=fields.document_payload(document))


def _request(vector: Any, using: str, query: SearchQuery, condition: models.Filter) -> models.QueryRequest:
    return models.QueryRequest(query=vector, using=using, filter=condition, limit=query.candidates, with_payload=False)


def _filter(conditions: Sequence[Condition]) -> models.Filter:
    must: list[models.Condition] = [_equals(fields.STATE, fields.VISIBLE)]
    must_not: list[models.Condition] = []
    for condition in conditions:
        if isinstance(condition, AnyTerm):
            match = models.MatchAny(any=list(condition.terms))
            (must_not if condition.negated else must).append(models.FieldCondition(key=fields.TERMS, match=match))
        else:
            bounds = models.Range(gte=condition.at_least, lte=condition.at_most)
            must.append(models.FieldCondition(key=f"{fields.NUMBERS}.{condition.field}", range=bounds))
    return models.Filter(must=must, must_not=must_not)


def _of_version(document: Document, ordinals: models.Range | None = None) -> models.Filter:
    must: list[models.Condition] = [
        _equals(fields.DOCUMENT_ID, document.document_id),
        _equals(fields.VERSION, document.version),
        models.FieldCondition(key=fields.STATE, match=models.MatchAny(any=[fields.STAGED, fields.VISIBLE])),
    ]
    if ordinals is not None:
        must.append(models.FieldCondition(key=fields.ORDINAL, range=ordinals))
    return models.Filter(must=must)


def _states(state: str) -> models.Filter:
    return models.Filter(must=[_equals(fields.STATE, state)])


def _staged_before(moment: float) -> models.FieldCondition:
    return models.FieldCondition(key=fields.STAGED_AT, range=models.Range(lt=moment))


def _equals(field: str, value: str) -> models.FieldCondition:
    return models.FieldCondition(key=field, match=models.MatchValue(value=value))


def _sparse(vector: SparseVector) -> models.SparseVector:
    return models.SparseVector(indices=list(vector.indices), values=list(vector.values))
