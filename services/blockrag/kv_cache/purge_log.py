"""What was purged, for readers that keep copies of their own (the decoders' L1)."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from itertools import islice

from blockrag.kv_cache.shard_messages import DocumentId, PurgeLog


def process_start() -> int:
    """A number larger than any that an earlier process counted to from its own (65,536 steps per millisecond)."""
    return time.time_ns() // 1_000_000 << 16


class PurgeJournal:
    """A bounded log of purged keys, read with a cursor.

    Cursors start at the process's start time, so the cursor of a reader that knew the shard before it died is behind
    the log's first entry and the reader is told to forget everything.
    """

    def __init__(self, *, capacity: int = 65_536, start: int | None = None) -> None:
        self._keys: deque[str] = deque(maxlen=capacity)
        self._end = process_start() if start is None else start

    def append(self, keys: Iterable[str]) -> None:
        """Adds keys; the oldest fall out of a full log."""
        for key in keys:
            self._keys.append(key)
            self._end += 1

    def reset_readers(self) -> None:
        """Makes every reader forget all its blocks at its next call."""
        self._keys.clear()
        self._end += 1

    def since(self, cursor: int) -> PurgeLog:
        """What a reader with this cursor has not seen. A new reader's cursor is 0: it gets a reset."""
        missed = self._end - cursor
        if missed < 0 or missed > len(self._keys):
            return PurgeLog(self._end, [], reset=True)
        return PurgeLog(self._end, list(islice(self._keys, len(self._keys) - missed, None)), reset=False)


class Departed:
    """Keys that the store no longer holds but a reader's own copy may: a purge must reach those too.

    Bounded: once the oldest had to be dropped, ``overflowed`` says that a purge can no longer name every key. Readers
    are told to forget everything then, and it can be cleared.
    """

    def __init__(self, *, capacity: int = 65_536) -> None:
        self._documents: OrderedDict[str, tuple[DocumentId, ...]] = OrderedDict()
        self._keys: dict[DocumentId, set[str]] = {}
        self._capacity = capacity
        self.overflowed = False

    def add(self, key: str, documents: Iterable[DocumentId]) -> None:
        """Remembers a key that left the store, with the documents it was part of."""
        named = {document for document in documents if document.named}
        named.update(self._documents.pop(key, ()))
        if not named:
            return
        self._documents[key] = tuple(named)
        for document in named:
            self._keys.setdefault(document, set()).add(key)
        if len(self._documents) > self._capacity:
            self._drop(next(iter(self._documents)))
            self.overflowed = True

    def take(self, document: DocumentId) -> set[str]:
        """The document's keys; they are forgotten."""
        keys = set(self._keys.get(document, ()))
        for key in keys:
            self._drop(key)
        return keys

    def clear(self) -> None:
        """Forgets all keys: no reader has a copy of any."""
        self._documents.clear()
        self._keys.clear()
        self.overflowed = False

    @property
    def documents(self) -> Collection[DocumentId]:
        """All documents that have keys here."""
        return self._keys.keys()

    def _drop(self, key: str) -> None:
        for document in self._documents.pop(key):
            keys = self._keys[document]
            keys.discard(key)
            if not keys:
                del self._keys[document]
