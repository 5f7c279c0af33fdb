"""The first-level cache: blocks that are already in the decoder's own memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockrag.modeling.slots import ResidentBlock


@dataclass(frozen=True)
class L1Stats:
    """Counters since the start, and what is held now."""

    blocks: int
    bytes: int
    """Of all blocks in memory: those that can be found, and those purged that a sequence still uses."""
    pinned_blocks: int
    budget_bytes: int
    hits: int
    misses: int


class L1Entry:
    """A block in use: the holder must ``release`` it once. Made by ``L1Cache`` only."""

    __slots__ = ("block", "last_used", "listed", "pins")

    def __init__(self, block: ResidentBlock, now: float) -> None:
        self.block = block
        self.pins = 0
        self.listed = True
        self.last_used = now


class L1Cache:
    """Least recently used blocks within a byte budget; may be called from any thread.

    A block that a sequence uses is pinned: it is neither evicted nor expired, so pinned blocks alone may exceed the
    budget. A purged block can no longer be found, but lives until its last holder releases it.
    """

    def __init__(self, budget_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget = budget_bytes
        self._ttl = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, L1Entry] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._pinned = 0
        self._hits = self._misses = 0

    def acquire(self, keys: Sequence[str]) -> list[L1Entry | None]:
        """The entries of ``keys``, pinned; None where a key is not held."""
        now = self._clock()
        found: list[L1Entry | None] = []
        with self._lock:
            self._expire(now)
            for key in keys:
                entry = self._entries.get(key)
                if entry is None:
                    self._misses += 1
                else:
                    self._hits += 1
                    self._pin(entry, now)
                found.append(entry)
        return found

    def __contains__(self, key: str) -> bool:
        """Whether a key is held; touches nothing."""
        with self._lock:
            self._expire(self._clock())
            return key in self._entries

    def insert(self, block: ResidentBlock, *, listed: bool = True) -> L1Entry:
        """The entry of a block, pinned: the one there is, or a new one.

        ``listed=False`` makes an entry that nobody else finds: for a block that was purged while it was on its way.
        """
        now = self._clock()
        with self._lock:
            entry = self._entries.get(block.key) if listed else None
            if entry is None:
                entry = L1Entry(block, now)
                entry.listed = listed
                self._bytes += block.nbytes
                if listed:
                    self._entries[block.key] = entry
            self._pin(entry, now)
            self._evict()
        return entry

    def release(self, entries: Iterable[L1Entry]) -> None:
        """Unpin entries that ``acquire`` or ``insert`` returned."""
        now = self._clock()
        with self._lock:
            for entry in entries:
                entry.pins -= 1
                self._touch(entry, now)
                if entry.pins == 0:
                    self._pinned -= 1
                    if not entry.listed:
                        self._bytes -= entry.block.nbytes
            self._evict()

    def purge(self, keys: Iterable[str]) -> None:
        """Forget blocks."""
        with self._lock:
            for key in keys:
                if (entry := self._entries.pop(key, None)) is not None:
                    self._unlist(entry)

    def clear(self) -> None:
        """Forget all blocks."""
        with self._lock:
            keys = list(self._entries)
        self.purge(keys)

    def expire(self) -> None:
        """Forget blocks that nobody used for the time to live."""
        with self._lock:
            self._expire(self._clock())

    def stats(self) -> L1Stats:
        """What happened and what is held."""
        with self._lock:
            return L1Stats(
                blocks=len(self._entries),
                bytes=self._bytes,
                pinned_blocks=self._pinned,
                budget_bytes=self._budget,
                hits=self._hits,
                misses=self._misses,
            )

    def _pin(self, entry: L1Entry, now: float) -> None:
        if entry.pins == 0:
            self._pinned += 1
        entry.pins += 1
        self._touch(entry, now)

    def _touch(self, entry: L1Entry, now: float) -> None:
        entry.last_used = now
        if entry.listed:
            self._entries.move_to_end(entry.block.key)

    def _evict(self) -> None:
        if self._bytes <= self._budget:
            return
        for key, entry in list(self._entries.items()):
            if self._bytes <= self._budget:
                return
            if entry.pins == 0:
                del self._entries[key]
                self._unlist(entry)

    def _expire(self, now: float) -> None:
        # entries stand in the order of their last use
        unused = list(takewhile(lambda entry: now - entry.last_used > self._ttl, self._entries.values()))
        for entry in unused:
            if entry.pins == 0:
                del self._entries[entry.block.key]
                self._unlist(entry)

    def _unlist(self, entry: L1Entry) -> None:
        entry.listed = False
        if entry.pins == 0:
            self._bytes -= entry.block.nbytes
