"""The shards of the embedded index, one on disk for each collection; few of them are open at a time."""

from __future__ import annotations

import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import qdrant_edge as qdrant

from blockrag.retriever import payload as fields
from blockrag.retriever.catalogue import check_room_for_changes

_logger = logging.getLogger(__name__)

MOST_OPEN = 32
"""Shards that are open: those used last. Each has threads, memory, files and mappings of its own; opening one takes
about a tenth of a second."""
FLUSH_AFTER_S = 2.0
"""Longest time that a change waits to be flushed. A flush costs 20 to 200 ms whatever its size."""
OPTIMIZE_AFTER_POINTS = 4000
"""Changed points after which segments are optimized: about a second of work each time."""
_SEGMENT_KB = 8000
_INDEXING_KB = 4000


class Shards:
    """Shards by the numbers of their collections, each opened when it is used. For one thread."""

    def __init__(
        self, path: Path, dimensions: int, opened: Callable[[int], bool], flushed: Callable[[int], None]
    ) -> None:
        """``opened``: told when a shard was opened; whether it has changes that may not be on disk. ``flushed``: told
        when all changes of a shard are."""
        self._path = path
        self._dimensions = dimensions
        self._tell_opened = opened
        self._tell_flushed = flushed
        self._open: OrderedDict[int, qdrant.EdgeShard] = OrderedDict()
        self._unflushed: dict[int, float] = {}
        self._changed_points: dict[int, int] = {}

    def __contains__(self, number: int) -> bool:
        """Whether it is open."""
        return number in self._open

    def __len__(self) -> int:
        return len(self._open)

    def get(self, number: int) -> qdrant.EdgeShard:
        """The shard, opened or made if need be; the one that was not used for longest may be closed for it."""
        shard = self._open.get(number)
        if shard is None:
            shard = self._opened(number)  # first: where there is no room to open it, the others stay open
            while len(self._open) >= MOST_OPEN:
                self.close(next(iter(self._open)))
            self._open[number] = shard
            try:
                changed = self._tell_opened(number)
            except BaseException:
                self._open.pop(number).close()
                raise
            if changed:
                self._unflushed.setdefault(number, time.monotonic())
        self._open.move_to_end(number)
        return shard

    def update(self, number: int, operation: qdrant.UpdateOperation, points: int) -> None:
        """Changes a shard. ``points``: how many are added or removed."""
        check_room_for_changes(self._path)
        self.get(number).update(operation)
        self._changed_points[number] = self._changed_points.get(number, 0) + points
        self._unflushed.setdefault(number, time.monotonic())

    def flush(self, number: int) -> None:
        """Where something changed in the shard, which is open."""
        if self._unflushed.pop(number, None) is None:
            return
        try:
            self._open[number].flush()
            self._tell_flushed(number)
        except BaseException:
            self._unflushed[number] = time.monotonic()  # behind the others, which wait no longer for it
            raise

    def tidy(self, *, idle: bool) -> bool:
        """Flushes one shard whose changes waited long enough, or any when idle, and optimizes one that changed much.

        Whether there is another one: a request goes between them.
        """
        due = self._due(idle=idle)
        if due:
            self.flush(due.pop(0))
        many = [number for number in self._open if self._changed_points.get(number, 0) >= OPTIMIZE_AFTER_POINTS]
        if many:
            del self._changed_points[many[0]]
            self._open[many.pop(0)].optimize()
        return bool(due or many)

    def close(self, number: int) -> None:
        """Lets an open shard go; what changed in it is flushed. Its log keeps what cannot be."""
        try:
            self.flush(number)
        except Exception:
            _logger.exception("a collection's shard could not be flushed")
        self._unflushed.pop(number, None)
        self._open.pop(number).close()

    def close_all(self) -> None:
        """Lets all shards go."""
        for number in list(self._open):
            self.close(number)

    def remove(self, number: int) -> None:
        """Deletes a shard, open or not."""
        self._unflushed.pop(number, None)
        self._changed_points.pop(number, None)
        shard = self._open.pop(number, None)
        if shard is not None:
            shard.close()
        shutil.rmtree(self.directory(number), ignore_errors=True)

    def directory(self, number: int) -> Path:
        """Where a shard's files are."""
        return self._path / f"shard-{number}"

    def remove_others(self, numbers: set[int]) -> None:
        """Deletes the shards of collections that are gone."""
        kept = {self.directory(number) for number in numbers}
        for directory in self._path.glob("shard-*"):
            if directory not in kept:
                shutil.rmtree(directory, ignore_errors=True)

    def _due(self, *, idle: bool) -> list[int]:
        now = time.monotonic()
        return [number for number, changed in self._unflushed.items() if idle or now - changed >= FLUSH_AFTER_S]

    def _opened(self, number: int) -> qdrant.EdgeShard:
        check_room_for_changes(self._path)
        directory = self.directory(number)
        if (directory / "edge_config.json").exists():
            shard = qdrant.EdgeShard.load(str(directory))
        else:
            # Missing, or the process was killed while it was made.
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            shard = qdrant.EdgeShard.create(str(directory), _shard_config(self._dimensions))
        indexed = shard.info().payload_schema
        for field in fields.KEYWORD_FIELDS:
            if field not in indexed:
                shard.update(qdrant.UpdateOperation.create_field_index(field, qdrant.PayloadSchemaType.Keyword))
        return shard


def _shard_config(dimensions: int) -> qdrant.EdgeConfig:
    return qdrant.EdgeConfig(
        vectors={fields.DENSE: qdrant.EdgeVectorParams(size=dimensions, distance=qdrant.Distance.Cosine)},
        sparse_vectors={fields.BM25: qdrant.EdgeSparseVectorParams(modifier=qdrant.Modifier.Idf)},
        # Small segments: the graph of one is built in about a second, during which no search is answered.
        optimizers=qdrant.EdgeOptimizersConfig(
            default_segment_number=1, max_segment_size=_SEGMENT_KB, indexing_threshold=_INDEXING_KB
        ),
    )
