"""The embedded index's catalogue: collections and visible documents, in SQLite beside the shards; and its folder.

One process holds the folder, and there is room on its disk before the engine writes. The engine writes through mapped
sparse files: on a full disk the kernel ends the process that writes (SIGBUS), and the next one too while it opens the
files. So nothing is begun that a disk nearly full could stop half way.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from blockrag.errors import DataError, OverloadedError, SettingsError, UnavailableError
from blockrag.identity import CollectionId
from blockrag.limits import MIB
from blockrag.retriever.vector_index import Counts, Document, EmbeddingInfo

DOCUMENTS_MIB = 256
"""What must be free where passages are added: a batch, and the segments that are copied when they are optimized."""
CHANGES_MIB = 64
"""What must be free where shards are opened, documents made visible or removed."""
_RETRY_MS = 60_000
_LOCK_POLL_S = 0.1

_logger = logging.getLogger(__name__)


def check_room_for_documents(path: Path) -> None:
    """Raises ``OverloadedError`` where the disk of a directory has no room for more of them."""
    free = _free_mib(path, DOCUMENTS_MIB)
    if free < DOCUMENTS_MIB:
        raise OverloadedError(
            f"the index's disk has {free} MiB free and takes documents from {DOCUMENTS_MIB}", _RETRY_MS
        )


def check_room_for_changes(path: Path) -> None:
    """Raises ``UnavailableError`` where nothing may be written at all."""
    free = _free_mib(path, CHANGES_MIB)
    if free < CHANGES_MIB:
        raise UnavailableError(f"the index's disk has {free} MiB free; it is opened and changed from {CHANGES_MIB}")


def _free_mib(path: Path, needed: int) -> int:
    free = shutil.disk_usage(path).free // MIB
    if free < needed:
        _logger.warning("the disk of %s has %d MiB free, %d are needed: make room", path, free, needed)
    return free


def locked(path: Path, wait_s: float) -> IO[str]:
    """Holds a file of the folder until it is closed. Raises ``UnavailableError`` when another process keeps it."""
    handle = path.open("a+")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                handle.close()
                raise UnavailableError(
                    f"the vector index in {path.parent} is in use by another process;"
                    " the embedded index serves one replica, use a Qdrant server for more"
                ) from None
            time.sleep(_LOCK_POLL_S)
        else:
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            return handle


_PROPERTIES = "CREATE TABLE IF NOT EXISTS properties (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS collections (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, name TEXT NOT NULL, language TEXT NOT NULL,
    UNIQUE (tenant, name)
);
CREATE TABLE IF NOT EXISTS documents (
    collection INTEGER NOT NULL REFERENCES collections (number) ON DELETE CASCADE,
    document_id TEXT NOT NULL, version TEXT NOT NULL, title TEXT NOT NULL, metadata TEXT NOT NULL,
    passages INTEGER NOT NULL, source TEXT NOT NULL, shown_by TEXT NOT NULL, synced INTEGER NOT NULL,
    PRIMARY KEY (collection, document_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unsynced ON documents (collection) WHERE synced = 0;
"""
_UNSETTLED = """
BEGIN IMMEDIATE;
CREATE TABLE unsettled (collection INTEGER PRIMARY KEY REFERENCES collections (number) ON DELETE CASCADE);
INSERT INTO unsettled SELECT number FROM collections;
COMMIT;
"""
"""At once, so that an index of before, in which any collection may be one, has all of them or no such table."""
_FORMAT = "2"
_COLUMNS = "document_id, version, title, passages, metadata, source, shown_by"


class Catalogue:
    """Use it in one thread. A document is *synced* once its passages were flushed to disk."""

    def __init__(self, path: Path, embedding: EmbeddingInfo) -> None:
        """Raises ``SettingsError`` when the index holds another model's vectors, ``DataError`` when damaged."""
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        with self._guarded():
            # A killed process loses nothing; what a power failure may lose, syncing makes up for.
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("PRAGMA foreign_keys = ON")
            self._database.execute(_PROPERTIES)
            self._check("format", _FORMAT, "its format is")
            self._database.executescript(_SCHEMA)
            if not self._rows("SELECT 1 FROM sqlite_master WHERE name = 'unsettled'"):
                self._database.executescript(_UNSETTLED)
            self.unsettled = {int(number) for (number,) in self._rows("SELECT collection FROM unsettled")}
            """Collections that may have staged passages or an interrupted commit, on disk before they do."""
            self._check("embedding", f"{embedding.fingerprint} {embedding.dimensions}", "its embedding model is")

    def close(self) -> None:
        self._database.close()

    def collection_number(self, collection: CollectionId) -> int | None:
        """The collection's number, which names its shard's directory; None: unknown."""
        rows = self._rows("SELECT number FROM collections WHERE tenant = ? AND name = ?", *_key(collection))
        return int(rows[0][0]) if rows else None

    def language(self, number: int) -> str:
        """The language of a collection's BM25 terms."""
        ((language,),) = self._rows("SELECT language FROM collections WHERE number = ?", number)
        return str(language)

    def add_collection(self, collection: CollectionId, language: str) -> int:
        """Makes a collection. Numbers are never used again."""
        self._rows("INSERT INTO collections (tenant, name, language) VALUES (?, ?, ?)", *_key(collection), language)
        number = self.collection_number(collection)
        assert number is not None
        return number

    def remove_collection(self, number: int) -> None:
        self._rows("DELETE FROM collections WHERE number = ?", number)
        self.unsettled.discard(number)

    def unsettle(self, number: int) -> None:
        """Before passages are staged: a process that is killed, or a machine that stops, leaves them to a sweep."""
        if number not in self.unsettled:
            self._rows("PRAGMA synchronous = FULL")
            self._rows("INSERT OR IGNORE INTO unsettled (collection) VALUES (?)", number)
            self._rows("PRAGMA synchronous = NORMAL")
            self.unsettled.add(number)

    def settle(self, number: int) -> None:
        """When nothing is staged and no commit interrupted, and that is on disk."""
        self._rows("DELETE FROM unsettled WHERE collection = ?", number)
        self.unsettled.discard(number)

    def collections(self) -> dict[CollectionId, int]:
        """All collections with their numbers, sorted."""
        rows = self._rows("SELECT tenant, name, number FROM collections")
        return {CollectionId(tenant, name): number for tenant, name, number in sorted(rows)}

    def put(self, number: int, document: Document) -> None:
        """Makes a version the visible one: the single step that readers see."""
        self._rows(
            f"INSERT OR REPLACE INTO documents (collection, {_COLUMNS}, synced) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)",
            number,
            document.document_id,
            document.version,
            document.title,
            document.passages,
            json.dumps(document.metadata, ensure_ascii=False),
            document.source,
            document.commit,
        )

    def remove(self, number: int, document_id: str) -> None:
        self._rows("DELETE FROM documents WHERE collection = ? AND document_id = ?", number, document_id)

    def document(self, number: int, document_id: str) -> Document | None:
        found = self.find(number, [document_id])
        return found[0] if found else None

    def find(self, number: int, document_ids: Sequence[str]) -> list[Document]:
        """Those of these documents that are visible, by id."""
        wanted = "document_id IN (SELECT value FROM json_each(?))"
        query = f"SELECT {_COLUMNS} FROM documents WHERE collection = ? AND {wanted} ORDER BY document_id"
        return [self._document(row) for row in self._rows(query, number, json.dumps(list(set(document_ids))))]

    def page(self, number: int, after: str, limit: int) -> list[Document]:
        """Documents whose id sorts after ``after``, by id."""
        query = f"SELECT {_COLUMNS} FROM documents WHERE collection = ? AND document_id > ?"
        rows = self._rows(f"{query} ORDER BY document_id LIMIT ?", number, after, limit)
        return [self._document(row) for row in rows]

    def counts(self, number: int) -> Counts:
        query = "SELECT COUNT(*), COALESCE(SUM(passages), 0) FROM documents WHERE collection = ?"
        ((documents, passages),) = self._rows(query, number)
        return Counts(int(documents), int(passages))

    def unsynced(self, number: int) -> list[Document]:
        """Documents whose passages may not be on disk yet."""
        query = f"SELECT {_COLUMNS} FROM documents WHERE collection = ? AND synced = 0"
        return [self._document(row) for row in self._rows(query, number)]

    def unsynced_collections(self) -> set[int]:
        """Collections that have such documents."""
        return {int(number) for (number,) in self._rows("SELECT DISTINCT collection FROM documents WHERE synced = 0")}

    def mark_synced(self, number: int) -> None:
        self._rows("UPDATE documents SET synced = 1 WHERE collection = ? AND synced = 0", number)

    def _check(self, name: str, value: str, what: str) -> None:
        self._rows("INSERT OR IGNORE INTO properties (name, value) VALUES (?, ?)", name, value)
        ((stored,),) = self._rows("SELECT value FROM properties WHERE name = ?", name)
        if stored != value:
            raise SettingsError(
                f"the index in {self._path.parent} does not fit: {what} {stored!r}, not {value!r};"
                " set retriever.path to a new directory and ingest again, or go back to the old setting"
            )

    def _document(self, row: tuple[str, str, str, int, str, str, str]) -> Document:
        document_id, version, title, passages, metadata, source, commit = row
        return Document(document_id, version, title, passages, json.loads(metadata), source, commit)

    def _rows(self, statement: str, *values: object) -> list[Any]:
        with self._guarded():
            return self._database.execute(statement, values).fetchall()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise DataError(f"the index's catalogue {self._path} is damaged: {error}") from error


def _key(collection: CollectionId) -> tuple[str, str]:
    return collection.tenant, collection.name
