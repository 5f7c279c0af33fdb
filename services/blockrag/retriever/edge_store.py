"""The embedded index: one Qdrant shard on disk for each collection, and the catalogue.

Synchronous and for one thread: Qdrant's engine holds Python's lock while it works (an ``optimize`` for seconds), so
this runs in a process of its own, see ``edge_worker``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import qdrant_edge as qdrant

from blockrag.errors import InvalidRequestError, NotFoundError
from blockrag.identity import CollectionId
from blockrag.languages import DEFAULT_LANGUAGE
from blockrag.results import PassageHolder
from blockrag.retriever import payload as fields
from blockrag.retriever.catalogue import Catalogue, check_room_for_changes, check_room_for_documents, locked
from blockrag.retriever.edge_filters import equals, of_commit, of_version, since, sparse, visible
from blockrag.retriever.edge_shards import Shards
from blockrag.retriever.fusion import FOUND_FIELDS, HELD_FIELDS, Candidate, candidate_of, fuse_texts, holders_of
from blockrag.retriever.vector_index import (
    COMMITS_WITHIN_S,
    MOST_CANDIDATES,
    MOST_HOLDERS,
    STAGED_FOR_S,
    Counts,
    Document,
    EmbeddedPassage,
    EmbeddingInfo,
    FoundPassage,
    Passage,
    SearchQuery,
    other_language,
    too_few_staged,
    unknown_collection,
    unknown_document,
)

_logger = logging.getLogger(__name__)

_SCROLL_LIMIT = 1000
_BLOCK_BYTES = 512
"""Of ``stat``'s blocks, whatever the file system's are."""


class EdgeStore:
    """Collections under one directory, for one process at a time. Methods as in ``VectorIndex``, but sweeping, in
    steps."""

    def __init__(self, path: Path, embedding: EmbeddingInfo, lock_wait_s: float) -> None:
        """Raises ``UnavailableError`` when another process holds the directory for longer than ``lock_wait_s``."""
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._embedding = embedding
        check_room_for_changes(path)
        self._lock = locked(path / "lock", lock_wait_s)
        self._catalogue = Catalogue(path / "catalogue.sqlite", embedding)
        self._shards = Shards(path, embedding.dimensions, self._opened, self._flushed)
        self._left = set(self._catalogue.unsettled)
        """Collections in which a commit may have been interrupted."""
        self._unverified = self._catalogue.unsynced_collections()
        """Those that were not opened yet since a process ended that had not flushed all."""
        self._shards.remove_others(set(self._catalogue.collections().values()))

    def stage(
        self, collection: CollectionId, passages: Sequence[EmbeddedPassage], language: str = DEFAULT_LANGUAGE
    ) -> None:
        check_room_for_documents(self._path)
        number = self._catalogue.collection_number(collection)
        if number is None:
            number = self._catalogue.add_collection(collection, language)
        elif (stored := self._catalogue.language(number)) != language:
            raise InvalidRequestError("language", other_language(collection, stored, language))
        staged_at = time.time()
        points = [
            qdrant.Point(
                fields.new_point(),
                {fields.DENSE: item.dense.tolist(), fields.BM25: sparse(item.sparse)},
                fields.passage_payload(item.passage, staged_at),
            )
            for item in passages
        ]
        self._catalogue.unsettle(number)
        self._shards.update(number, qdrant.UpdateOperation.upsert_points(points), len(points))

    def language(self, collection: CollectionId) -> str:
        return self._catalogue.language(self._number(collection))

    def commit(self, collection: CollectionId, document: Document) -> str:
        check_room_for_changes(self._path)
        number = self._catalogue.collection_number(collection)
        if number is None:
            raise InvalidRequestError("passages", too_few_staged(0, document))
        self._verify(number)
        current = self._catalogue.document(number, document.document_id)
        if current is not None and current.version == document.version:
            return ""
        shown = replace(document, commit=fields.new_commit())
        try:
            self._mark(number, shown)
            self._catalogue.put(number, shown)
            settled = qdrant.UpdateOperation.delete_payload_by_filter(of_commit(shown.commit), [fields.SINCE])
            self._shards.update(number, settled, 0)
            self._remove_older(number, document.document_id, current.commit if current else "")
        except Exception:
            self._left.add(number)
            raise
        return current.version if current else ""

    def remove_document(self, collection: CollectionId, document_id: str) -> int:
        check_room_for_changes(self._path)
        number = self._verified(collection)
        current = self._catalogue.document(number, document_id)
        self._catalogue.remove(number, document_id)
        # Nobody else is within a call: what is staged for it can go too.
        of_document = qdrant.Filter(must=[equals(fields.DOCUMENT_ID, document_id)])
        points = self._count(number, of_document)
        if current is None and not points:
            raise NotFoundError(unknown_document(collection, document_id))
        self._shards.update(number, qdrant.UpdateOperation.delete_points_by_filter(of_document), points)
        return current.passages if current else 0

    def remove_collection(self, collection: CollectionId) -> Counts:
        number = self._number(collection)
        counts = self._catalogue.counts(number)
        self._catalogue.remove_collection(number)
        self._shards.remove(number)
        self._left.discard(number)
        self._unverified.discard(number)
        return counts

    def search(self, collection: CollectionId, query: SearchQuery) -> list[FoundPassage]:
        number = self._number(collection)
        candidates = query.candidates
        while True:
            searches = self._candidates(number, query, candidates)
            fused = fuse_texts(self._shown(number, searches), query.rrf_k)
            cut = any(len(search) == candidates for search in searches)
            if len(fused) >= query.limit or not cut or candidates >= MOST_CANDIDATES:
                break
            # Many equal texts: there are others behind them.
            candidates = min(candidates * 4, MOST_CANDIDATES)
        best = fused[: query.limit]
        if not best:
            return []
        shard = self._shards.get(number)
        records = shard.retrieve([one.point for one, _ in best], with_payload=True, with_vector=False)
        payloads = {str(record.id): record.payload or {} for record in records}
        holders = self._holders(number, query, [one for one, _ in best])
        return [
            FoundPassage(fields.passage_of(payloads[one.point]), score, holders.get(one.digest, ()))
            for one, score in best
        ]

    def documents(self, collection: CollectionId, after: str, limit: int) -> list[Document]:
        return self._catalogue.page(self._verified(collection), after, limit)

    def find_documents(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Document]:
        return self._catalogue.find(self._verified(collection), document_ids)

    def passages(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Passage]:
        number = self._verified(collection)
        return [
            passage
            for document in self._catalogue.find(number, document_ids)
            for passage in sorted(
                (fields.passage_of(payload) for _, payload in self._scroll(number, of_commit(document.commit), True)),
                key=lambda passage: passage.ordinal,
            )
        ]

    def counts(self, collection: CollectionId) -> Counts:
        return self._catalogue.counts(self._number(collection))

    def disk_bytes(self, collection: CollectionId) -> int:
        # Blocks, not lengths: the engine's files are sparse.
        directory = self._shards.directory(self._number(collection))
        files = (file.stat() for file in directory.rglob("*") if file.is_file())
        return sum(file.st_blocks for file in files) * _BLOCK_BYTES

    def collections(self, tenant: str | None) -> list[CollectionId]:
        return [identity for identity in self._catalogue.collections() if tenant in (None, identity.tenant)]

    def unsettled(self) -> list[int]:
        """Collections for ``sweep_one``, those first whose documents may be lost. Others need not be opened."""
        return [*sorted(self._unverified), *sorted(self._catalogue.unsettled - self._unverified)]

    def sweep_one(self, number: int, older_than_s: float = STAGED_FOR_S) -> None:
        """Sweeps one collection. Its shard is closed again unless it was open, so that those in use stay so."""
        if number not in self._catalogue.unsettled | self._unverified:
            return
        was_open = number in self._shards
        stale = qdrant.Filter(must=[equals(fields.STATE, fields.STAGED), since(time.time() - older_than_s)])
        if points := self._count(number, stale):
            _logger.info("sweeping %d passages that were never committed", points)
            self._shards.update(number, qdrant.UpdateOperation.delete_points_by_filter(stale), points)
        self._finish_commits(number)
        self._left.discard(number)
        self._shards.flush(number)
        self._settle(number)
        if not was_open:
            self._shards.close(number)

    def tidy(self, *, idle: bool) -> bool:
        """See ``Shards.tidy``."""
        return self._shards.tidy(idle=idle)

    def close(self) -> None:
        """Flushes everything and lets the directory go."""
        self._shards.close_all()
        self._catalogue.close()
        self._lock.close()

    def _mark(self, number: int, document: Document) -> None:
        """Marks one staged point for each place of a version as shown by the document's commit."""
        staged = qdrant.Filter(must=[*of_version(document), equals(fields.STATE, fields.STAGED)])
        points = fields.one_for_each_place(self._scroll(number, staged, [fields.ORDINAL]), document)
        marks = {fields.STATE: fields.VISIBLE, fields.COMMIT: document.commit, fields.SINCE: time.time()}
        self._shards.update(number, qdrant.UpdateOperation.set_payload(list(points), marks), 0)

    def _remove_older(self, number: int, document_id: str, replaced: str) -> None:
        # What is being staged right now stays.
        long_ago = [equals(fields.DOCUMENT_ID, document_id), since(time.time() - COMMITS_WITHIN_S)]
        stale = qdrant.Filter(must=[*long_ago, equals(fields.STATE, fields.STAGED)])
        for condition in (of_commit(replaced), stale) if replaced else (stale,):
            if points := self._count(number, condition):
                self._shards.update(number, qdrant.UpdateOperation.delete_points_by_filter(condition), points)

    def _finish_commits(self, number: int) -> None:
        """Removes or settles what a process left that was killed within a commit; nobody else is within one."""
        within = qdrant.Filter(must=[equals(fields.STATE, fields.VISIBLE), since(time.time() + 1)])
        left = self._scroll(number, within, [fields.DOCUMENT_ID, fields.COMMIT])
        for document_id, commit in {(payload[fields.DOCUMENT_ID], payload[fields.COMMIT]) for _, payload in left}:
            shown = self._catalogue.document(number, document_id)
            if shown is not None and shown.commit == commit:
                done = qdrant.UpdateOperation.delete_payload_by_filter(of_commit(commit), [fields.SINCE])
            else:
                done = qdrant.UpdateOperation.delete_points_by_filter(of_commit(commit))
            self._shards.update(number, done, 0)

    def _candidates(self, number: int, query: SearchQuery, candidates: int) -> list[list[Candidate]]:
        condition = visible(query.conditions)
        queries = []
        if query.dense is not None:
            queries.append(qdrant.Query.Nearest(query.dense.tolist(), fields.DENSE))
        if query.sparse.indices:
            queries.append(qdrant.Query.Nearest(sparse(query.sparse), fields.BM25))
        shard = self._shards.get(number)
        return [
            [
                candidate_of(str(point.id), point.payload or {}, point.score)
                for point in shard.query(
                    qdrant.QueryRequest(limit=candidates, query=search, filter=condition, with_payload=FOUND_FIELDS)
                )
            ]
            for search in queries
        ]

    def _shown(self, number: int, searches: list[list[Candidate]]) -> list[list[Candidate]]:
        """What the catalogue's entries show of it."""
        documents = self._catalogue.find(number, [one.document_id for search in searches for one in search])
        commits = {document.commit for document in documents}
        return [[one for one in search if one.commit in commits] for search in searches]

    def _holders(
        self, number: int, query: SearchQuery, best: Sequence[Candidate]
    ) -> dict[str, tuple[PassageHolder, ...]]:
        digests = qdrant.MatchAny([one.digest for one in best])
        held = visible(query.conditions, qdrant.FieldCondition(fields.DIGEST, match=digests))
        payloads = [payload for _, payload in self._scroll(number, held, HELD_FIELDS, MOST_HOLDERS)]
        if len(payloads) <= len(best):
            return {}
        documents = self._catalogue.find(number, [payload[fields.DOCUMENT_ID] for payload in payloads])
        return holders_of(payloads, documents, best)

    def _scroll(
        self, number: int, condition: qdrant.Filter, wanted: bool | list[str], most: int | None = None
    ) -> list[tuple[str, dict[str, Any]]]:
        found: list[tuple[str, dict[str, Any]]] = []
        offset: Any = None
        while True:
            records, offset = self._shards.get(number).scroll(
                qdrant.ScrollRequest(offset=offset, limit=_SCROLL_LIMIT, filter=condition, with_payload=wanted)
            )
            found += [(str(record.id), record.payload or {}) for record in records]
            if offset is None or (most is not None and len(found) >= most):
                return found

    def _number(self, collection: CollectionId) -> int:
        number = self._catalogue.collection_number(collection)
        if number is None:
            raise NotFoundError(unknown_collection(collection))
        return number

    def _count(self, number: int, condition: qdrant.Filter) -> int:
        return self._shards.get(number).count(qdrant.CountRequest(exact=True, filter=condition))

    def _verified(self, collection: CollectionId) -> int:
        """The collection's number, for what tells of its documents or changes them."""
        number = self._number(collection)
        self._verify(number)
        return number

    def _verify(self, number: int) -> None:
        if number in self._unverified:
            self._shards.get(number)

    def _opened(self, number: int) -> bool:
        """After a power failure, documents whose passages did not reach the disk are forgotten."""
        documents = self._catalogue.unsynced(number)
        for document in documents:
            if (kept := self._count(number, of_commit(document.commit))) < document.passages:
                _logger.warning(
                    "forgetting document %r, of which %d of %d passages reached the disk",
                    document.document_id,
                    kept,
                    document.passages,
                )
                self._catalogue.remove(number, document.document_id)
        unflushed = bool(documents) or number in self._left
        self._unverified.discard(number)
        return unflushed

    def _flushed(self, number: int) -> None:
        self._catalogue.mark_synced(number)
        self._settle(number)

    def _settle(self, number: int) -> None:
        """Where all is on disk: a collection with nothing for a sweep to find need not be opened by one."""
        if number in self._catalogue.unsettled and number not in self._left:
            staged = qdrant.Filter(must=[equals(fields.STATE, fields.STAGED)])
            if not self._count(number, staged):
                self._catalogue.settle(number)
