"""A Qdrant server as a ``VectorIndex``: one Qdrant collection for each collection, the catalogue as points in it.

Several replicas may share a server and change the same document at once. The catalogue's entry of a document is a
point without vectors; it is written only where it is still what the writer read, and that one write switches versions.
Whatever a search finds is checked against it, so a replica that dies between two steps leaves nothing wrong in sight;
what it leaves out of sight has the field ``since`` and is swept.
"""

from __future__ import annotations

import bisect
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus

from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from blockrag.errors import InvalidRequestError, NotFoundError, SettingsError, UnavailableError
from blockrag.identity import CollectionId
from blockrag.languages import DEFAULT_LANGUAGE
from blockrag.lru import Lru
from blockrag.results import PassageHolder
from blockrag.retriever import payload as fields
from blockrag.retriever.fusion import HELD_FIELDS, Candidate, fuse_texts, holders_of
from blockrag.retriever.server_points import (
    MODEL_POINT,
    Payload,
    Points,
    any_of,
    check_version,
    collection_name,
    equals,
    identity_of,
    of_commit,
    settled,
    states,
    visible,
    waiting,
)
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
    VectorIndex,
    other_language,
    too_few_staged,
    unknown_collection,
    unknown_document,
)

_FORMAT = 2
_TIMEOUT_S = 30
_ROUNDS = 32
"""Most times that a search or a commit is repeated because documents changed under it."""
_REMEMBERED_COMMITS = 65_536
_LISTING_S = 60.0
_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class ServerIndex(VectorIndex):
    """Collections of one Qdrant server."""

    def __init__(self, client: AsyncQdrantClient, embedding: EmbeddingInfo, address: str) -> None:
        """``address`` names the server in errors."""
        self._client = client
        self._embedding = embedding
        self._address = address
        self._server_checked = False
        self._searches = 0
        self._seen: Lru[tuple[str, str], tuple[str, int]] = Lru(_REMEMBERED_COMMITS)
        self._listings: Lru[str, tuple[float, list[str]]] = Lru(64)

    @classmethod
    def connect(cls, url: str, api_key: str, embedding: EmbeddingInfo) -> ServerIndex:
        """Connects when first used."""
        with warnings.catch_warnings():
            # Inside a cluster a key over plain HTTP is usual; TLS is the operator's choice by the URL.
            warnings.filterwarnings("ignore", message="Api key is used with an insecure connection")
            client = AsyncQdrantClient(url=url, api_key=api_key or None, timeout=_TIMEOUT_S, check_compatibility=False)
        return cls(client, embedding, url)

    async def stage(
        self, collection: CollectionId, passages: Sequence[EmbeddedPassage], language: str = DEFAULT_LANGUAGE
    ) -> None:
        try:
            await self._stage(collection, passages, language)
        except NotFoundError:
            # Somebody removed the collection between two steps.
            await self._stage(collection, passages, language)

    async def language(self, collection: CollectionId) -> str:
        with self._translated(collection):
            return await self._language(collection_name(collection))

    async def commit(self, collection: CollectionId, document: Document) -> str:
        try:
            with self._translated(collection):
                return await self._commit(self._points(collection), document)
        except NotFoundError:
            raise InvalidRequestError("passages", too_few_staged(0, document)) from None

    async def remove_document(self, collection: CollectionId, document_id: str) -> int:
        points = self._points(collection)
        with self._translated(collection):
            removed: Document | None = None
            while current := await points.entry(document_id):
                removed = removed or current
                # From here on its passages are found by the sweep, should this process die.
                await points.set({fields.SINCE: time.time()}, of_commit(current.commit))
                await points.remove_entry(current)
                await points.delete(of_commit(current.commit))
            staged = models.Filter(must=[equals(fields.DOCUMENT_ID, document_id), equals(fields.STATE, fields.STAGED)])
            if removed is None and not await points.count(staged):
                raise NotFoundError(unknown_document(collection, document_id))
            await points.delete(staged)
            await self._tidy(points, document_id)
            return removed.passages if removed else 0

    async def remove_collection(self, collection: CollectionId) -> Counts:
        counts = await self.counts(collection)
        with self._translated(collection):
            if not await self._client.delete_collection(collection_name(collection)):
                raise NotFoundError(unknown_collection(collection))
        return counts

    async def search(self, collection: CollectionId, query: SearchQuery) -> list[FoundPassage]:
        """Repeated until the documents found are known not to have changed meanwhile.

        A document is known so when its entry names the commit that it named before the search.
        """
        name, points = collection_name(collection), self._points(collection)
        candidates, without, watched = query.candidates, set[str](), set[str]()
        with self._translated(collection):
            await self._language(name)
            best: list[tuple[Candidate, float]] = []
            records: dict[str, Payload] = {}
            for _ in range(_ROUNDS):
                self._searches = started = self._searches + 1
                searches = await points.search(query, candidates, without)
                found = [candidate for search in searches for candidate in search]
                watched |= {one.document_id for one in found}
                shown = {item.document_id: item.commit for item in await points.entries(watched)}
                changed = self._changed(name, watched, shown, started)
                stale = {one.commit for one in found} - set(shown.values())
                without = (without | stale) - set(shown.values())
                current = [[one for one in search if shown.get(one.document_id) == one.commit] for search in searches]
                fused = fuse_texts(current, query.rrf_k)
                best = fused[: query.limit]
                records = await points.load([one.point for one, _ in best])
                if changed or stale or len(records) < len(best):
                    continue
                cut = any(len(search) == candidates for search in searches)
                if len(fused) >= query.limit or not cut or candidates >= MOST_CANDIDATES:
                    break
                candidates = min(candidates * 4, MOST_CANDIDATES)
            holders = await self._holders(points, query, [one for one, _ in best])
        return [
            FoundPassage(fields.passage_of(records[one.point]), score, holders.get(one.digest, ()))
            for one, score in best
            if one.point in records
        ]

    async def documents(self, collection: CollectionId, after: str, limit: int) -> list[Document]:
        name, points = collection_name(collection), self._points(collection)
        with self._translated(collection):
            # The server cannot order by a string: the ids are sorted here, once for all pages, which are read by id.
            made, ids = self._listings.get(name) or (0.0, [])
            place = bisect.bisect_right(ids, after)
            if not after or not place or ids[place - 1] != after or time.monotonic() - made > _LISTING_S:
                entries = await points.scroll(states(fields.DOCUMENT), [fields.DOCUMENT_ID])
                ids = sorted(payload[fields.DOCUMENT_ID] for _, payload in entries)
                self._listings.put(name, (time.monotonic(), ids))
                place = bisect.bisect_right(ids, after)
            page: list[Document] = []
            while place < len(ids) and len(page) < limit:
                # Some may be gone by now.
                part = ids[place : place + limit - len(page)]
                page += await points.entries(part)
                place += len(part)
            return page

    async def find_documents(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Document]:
        with self._translated(collection):
            if not document_ids:
                await self._client.get_collection(collection_name(collection))
            return await self._points(collection).entries(document_ids)

    async def passages(self, collection: CollectionId, document_ids: Sequence[str]) -> list[Passage]:
        found: list[Passage] = []
        points = self._points(collection)
        with self._translated(collection):
            for listed in await points.entries(document_ids):
                found += await self._passages(points, listed)
        return found

    async def counts(self, collection: CollectionId) -> Counts:
        points = self._points(collection)
        with self._translated(collection):
            documents, passages = await points.count(states(fields.DOCUMENT)), await points.count(settled())
            return Counts(documents, passages)

    async def disk_bytes(self, collection: CollectionId) -> int:
        with self._translated(collection):
            return await self._points(collection).disk_bytes(self._embedding.dimensions)

    async def collections(self, tenant: str | None) -> list[CollectionId]:
        with self._translated(None):
            answer = await self._client.get_collections()
        identities = [identity_of(item.name) for item in answer.collections]
        return sorted(identity for identity in identities if identity and tenant in (None, identity.tenant))

    async def sweep(self, older_than_s: float = STAGED_FOR_S) -> None:
        for collection in await self.collections(None):
            points = self._points(collection)
            with self._translated(collection):
                await points.delete(waiting(fields.STAGED, time.time() - older_than_s))
                await self._tidy(points)

    async def close(self) -> None:
        await self._client.close()

    async def _stage(self, collection: CollectionId, passages: Sequence[EmbeddedPassage], language: str) -> None:
        with self._translated(collection):
            stored = await self._ensure(collection_name(collection), language)
            if stored != language:
                raise InvalidRequestError("language", other_language(collection, stored, language))
            await self._points(collection).put(passages)

    async def _commit(self, points: Points, document: Document) -> str:
        commit = fields.new_commit()
        marked = False
        replaced: Document | None = None
        for _ in range(_ROUNDS):
            current = await points.entry(document.document_id)
            if current is not None and current.version == document.version and current.commit != commit:
                await points.delete(of_commit(commit))
                return ""
            if not marked:
                marked = await points.mark(document, commit)
                continue
            if current is not None:
                await points.set({fields.SINCE: time.time()}, of_commit(current.commit))
            await points.write_entry(document, commit, current)
            replaced = current
            written = await points.entry(document.document_id)
            if written is not None and written.commit == commit:
                break
            # Another change came first, or came after and took this one's place. A commit that was shown once is never
            # shown again, so another mark tells: passages that still are all there were not removed by anybody.
            again = fields.new_commit()
            await points.set({fields.COMMIT: again, fields.SINCE: time.time()}, of_commit(commit))
            commit = again
            if await points.count(of_commit(commit)) < document.passages:
                await points.delete(of_commit(commit))
                break
        else:
            raise UnavailableError(f"document {document.document_id!r} is being changed by others; send it again")
        await points.settle(commit)
        if replaced is not None:
            await points.delete(of_commit(replaced.commit))
        await self._tidy(points, document.document_id)
        return replaced.version if replaced else ""

    async def _tidy(self, points: Points, document_id: str = "") -> None:
        """Removes what commits and removals left behind that died, of one document or of all."""
        long_ago = time.time() - COMMITS_WITHIN_S
        if document_id:
            await points.delete(waiting(fields.STAGED, long_ago, document_id))
        left = await points.scroll(waiting(fields.VISIBLE, long_ago, document_id), [fields.DOCUMENT_ID, fields.COMMIT])
        for owner, commit in {(payload[fields.DOCUMENT_ID], payload[fields.COMMIT]) for _, payload in left}:
            entry = await points.entry(owner)
            if entry is not None and entry.commit == commit:
                await points.settle(commit)
            else:
                await points.delete(of_commit(commit))

    async def _passages(self, points: Points, document: Document) -> list[Passage]:
        """All passages of a document, of one version."""
        current: Document | None = document
        for _ in range(_ROUNDS):
            if current is None:
                return []
            payloads = [payload for _, payload in await points.scroll(of_commit(current.commit), True)]
            before, current = current, await points.entry(document.document_id)
            if len(payloads) == before.passages or (current is not None and current.commit == before.commit):
                return sorted(map(fields.passage_of, payloads), key=lambda passage: passage.ordinal)
        raise UnavailableError(f"document {document.document_id!r} is being changed; ask again")

    def _changed(self, name: str, document_ids: set[str], shown: dict[str, str], started: int) -> bool:
        """Whether one of the documents is shown by another commit than was known when search ``started`` began."""
        changed = False
        for document_id in document_ids:
            commit, since = self._seen.get((name, document_id)) or ("", 0)
            if commit != shown.get(document_id, ""):
                self._seen.put((name, document_id), (shown.get(document_id, ""), self._searches))
                changed = True
            changed = changed or since >= started
        return changed

    async def _holders(
        self, points: Points, query: SearchQuery, best: Sequence[Candidate]
    ) -> dict[str, tuple[PassageHolder, ...]]:
        """Of each text, by its digest, the documents that hold it besides the one that stands for it."""
        if not best:
            return {}
        held = models.Filter(must=[visible(query.conditions), any_of(fields.DIGEST, [one.digest for one in best])])
        payloads = [payload for _, payload in await points.scroll(held, HELD_FIELDS, MOST_HOLDERS)]
        if len(payloads) <= len(best):
            return {}
        entries = await points.entries(payload[fields.DOCUMENT_ID] for payload in payloads)
        return holders_of(payloads, entries, best)

    def _points(self, collection: CollectionId) -> Points:
        return Points(self._client, collection_name(collection))

    async def _ensure(self, name: str, language: str) -> str:
        """Makes the collection when it is missing; returns its language."""
        await self._check_server()
        if not await self._client.collection_exists(name):
            vectors = models.VectorParams(size=self._embedding.dimensions, distance=models.Distance.COSINE)
            sparse = models.SparseVectorParams(modifier=models.Modifier.IDF)
            try:
                await self._client.create_collection(
                    name, vectors_config={fields.DENSE: vectors}, sparse_vectors_config={fields.BM25: sparse}
                )
            except (UnexpectedResponse, ValueError) as error:
                # Another replica may have been faster.
                if getattr(error, "status_code", HTTPStatus.CONFLICT) != HTTPStatus.CONFLICT:
                    raise
        for field in fields.KEYWORD_FIELDS:
            await self._client.create_payload_index(name, field, models.PayloadSchemaType.KEYWORD, wait=True)
        if not await self._client.retrieve(name, [MODEL_POINT]):
            payload = {
                fields.STATE: fields.MODEL,
                "format": _FORMAT,
                "fingerprint": self._embedding.fingerprint,
                "language": language,
            }
            point = models.PointStruct(id=MODEL_POINT, vector={}, payload=payload)
            # The first of several writers says what the collection is.
            absent = models.Filter(must=[equals(fields.STATE, fields.DOCUMENT)])
            await self._client.upsert(name, [point], wait=True, update_filter=absent)
        return await self._language(name)

    async def _language(self, name: str) -> str:
        """The collection's language; refuses a collection whose vectors or points were made in another way."""
        records = await self._client.retrieve(name, [MODEL_POINT], with_payload=True)
        if not records:
            # Another replica is making it.
            return DEFAULT_LANGUAGE
        payload = records[0].payload or {}
        wanted = {"format": _FORMAT, "fingerprint": self._embedding.fingerprint}
        for key, what in (("format", "its format"), ("fingerprint", "its embedding model")):
            if payload.get(key) != wanted[key]:
                raise SettingsError(
                    f"collection {name} at {self._address} does not fit: {what} is {payload.get(key)!r}, not"
                    f" {wanted[key]!r}; delete it and ingest again, or go back to the old setting"
                )
        return str(payload["language"])

    async def _check_server(self) -> None:
        """Refuses a server that would ignore the conditions of changes."""
        if self._server_checked:
            return
        check_version((await self._client.info()).version, self._address)
        self._server_checked = True

    @contextmanager
    def _translated(self, collection: CollectionId | None) -> Iterator[None]:
        try:
            yield
        except UnexpectedResponse as error:
            if error.status_code == HTTPStatus.NOT_FOUND and collection is not None:
                raise NotFoundError(unknown_collection(collection)) from error
            if error.status_code in _REFUSED:
                raise UnavailableError(f"the vector store at {self._address} refuses the API key") from error
            raise UnavailableError(f"the vector store at {self._address} failed: {str(error)[:500]}") from error
        except (ResponseHandlingException, ApiException, OSError) as error:
            raise UnavailableError(f"the vector store at {self._address} cannot be reached: {error}") from error
        except ValueError as error:
            # What the client's in-memory stand-in raises where the server answers 404.
            if collection is not None and str(error).endswith("not found"):
                raise NotFoundError(unknown_collection(collection)) from error
            raise
