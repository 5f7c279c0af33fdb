"""Many callers change and read the same documents at once, in both engines, in orders that hypothesis draws.

The engines are real; what is drawn is whose next request reaches the store first. A request itself is one step, as it
is for a Qdrant server, so every order in which a server can meet the requests can be drawn.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import AsyncQdrantClient

from blockrag.errors import InvalidRequestError, NotFoundError
from blockrag.retriever.edge_store import EdgeStore
from blockrag.retriever.server import ServerIndex
from blockrag.retriever.vector_index import Counts, VectorIndex
from tests.unit.retriever.passages import EMBEDDING, HOME, document, embedded, query

DOCUMENTS = ("a", "b")
PASSAGES = {"v1": 3, "v2": 2, "v3": 5}
STEPS_OF_ONE_CALL = 2000


class Turns:
    """Lets one request through at a time; ``choose`` says whose."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose
        self._waiting: list[asyncio.Future[None]] = []
        self.now = 0

    async def wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    async def run(self, *calls: Coroutine[Any, Any, None]) -> None:
        tasks = [asyncio.create_task(call) for call in calls]
        for _ in range(STEPS_OF_ONE_CALL * len(tasks)):
            # Until everybody waits for a turn, or is done.
            for _ in range(6):
                await asyncio.sleep(0)
            if not self._waiting:
                break
            self.now += 1
            self._waiting.pop(self._choose(len(self._waiting))).set_result(None)
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks)

    def through(self, target: Any, *, sync: bool) -> Any:
        """``target``, each of whose methods waits for its turn."""
        return _Through(self, target, sync)


class _Through:
    def __init__(self, turns: Turns, target: Any, sync: bool) -> None:
        self._parts = turns, target, sync

    def __getattr__(self, name: str) -> Any:
        turns, target, sync = self._parts
        method = getattr(target, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            await turns.wait()
            return method(*arguments, **options) if sync else await method(*arguments, **options)

        return call


@dataclass
class Change:
    """An ingest or a removal that happened; ``version`` is empty for a removal and for the empty beginning."""

    document_id: str
    version: str
    start: int
    end: int


class History:
    """The model: what a reader may see between two moments."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.changes = [Change(document_id, "", -1, -1) for document_id in DOCUMENTS]
        self.disturbances: list[tuple[int, int]] = []
        """When something removed staged passages."""
        self.staging: list[Change] = []
        """Ingests with their staging."""

    def possible(self, document_id: str, start: int, end: int) -> set[str]:
        """Versions whose change may be the latest one for some moment from ``start`` to ``end``."""
        changes = [change for change in self.changes if change.document_id == document_id and change.start <= end]
        return {
            change.version
            for change in changes
            if not any(change.end < later.start and later.end < start for later in changes)
        }

    def disturbed(self, staging: Change) -> bool:
        """Whether staged passages were removed while this was staged, or an ingest that may have taken some of its own.

        Who lost passages and finds another's of the same version staged commits those; the other may then lack them.
        """
        start = staging.start
        for _ in self.staging:  # as many steps as there are ingests reach all that are tied to this one
            start = min(
                other.start
                for other in self.staging
                if (other.document_id, other.version) == (staging.document_id, staging.version) and other.end >= start
            )
        return any(begun <= self.turns.now and ended >= start for begun, ended in self.disturbances)

    @contextmanager
    def changing(self, document_id: str, version: str) -> Iterator[Change]:
        change = Change(document_id, version, self.turns.now, 10**9)
        # From its beginning on others may see it.
        self.changes.append(change)
        try:
            yield change
        except InvalidRequestError:
            self.changes.remove(change)
            raise
        finally:
            change.end = self.turns.now


async def ingest(index: VectorIndex, history: History, document_id: str, version: str) -> None:
    count = PASSAGES[version]
    staging = Change(document_id, version, history.turns.now, 10**9)
    history.staging.append(staging)
    for ordinals in _batched(count):
        await index.stage(HOME, [embedded(document_id, version, ordinal) for ordinal in ordinals])
    try:
        with history.changing(document_id, version):
            await index.commit(HOME, document(document_id, version, count))
    except InvalidRequestError as error:
        assert "staged" in error.problem
        # Only who removes what is staged may make an ingest fail.
        assert history.disturbed(staging)
    finally:
        staging.end = history.turns.now


def _batched(count: int) -> Iterator[range]:
    for start in range(0, count, 2):
        yield range(start, min(start + 2, count))


async def remove(index: VectorIndex, history: History, document_id: str, _: str) -> None:
    place = len(history.disturbances)
    history.disturbances.append((history.turns.now, 10**9))
    with history.changing(document_id, ""), suppress(NotFoundError):
        await index.remove_document(HOME, document_id)
    history.disturbances[place] = (history.disturbances[place][0], history.turns.now)


async def sweep(index: VectorIndex, history: History, _: str, __: str) -> None:
    place = len(history.disturbances)
    history.disturbances.append((history.turns.now, 10**9))
    await index.sweep(older_than_s=-1)
    history.disturbances[place] = (history.disturbances[place][0], history.turns.now)


async def look(index: VectorIndex, history: History, _: str, __: str) -> None:
    start = history.turns.now
    seen = await search(index)
    for document_id in DOCUMENTS:
        check(history, document_id, seen.get(document_id, {}), start)


async def read(index: VectorIndex, history: History, document_id: str, _: str) -> None:
    start = history.turns.now
    versions: dict[str, list[int]] = {}
    for passage in await index.passages(HOME, [document_id]):
        versions.setdefault(passage.version, []).append(passage.ordinal)
    check(history, document_id, versions, start)


async def search(index: VectorIndex) -> dict[str, dict[str, list[int]]]:
    """Ordinals found, by document and version."""
    seen: dict[str, dict[str, list[int]]] = {}
    # Fewer candidates than there are passages when versions stand side by side.
    for found in await index.search(HOME, query(limit=10, candidates=10)):
        passage = found.passage
        seen.setdefault(passage.document_id, {}).setdefault(passage.version, []).append(passage.ordinal)
    return seen


def check(history: History, document_id: str, versions: dict[str, list[int]], start: int) -> None:
    possible = history.possible(document_id, start, history.turns.now)
    assert len(versions) <= 1, f"{document_id}: a mixture of {versions}"
    version = next(iter(versions), "")
    assert version in possible, f"{document_id}: {version or 'nothing'!r}, not {possible}"
    if version:
        assert sorted(versions[version]) == list(range(PASSAGES[version])), f"{document_id} is not whole: {versions}"


CALLS = {"ingest": ingest, "remove": remove, "sweep": sweep, "look": look, "read": read}
CALL = st.tuples(
    st.sampled_from(["ingest", "ingest", "ingest", "ingest", "remove", "look", "look", "read", "sweep"]),
    st.sampled_from(["a", "a", "a", "b"]),
    st.sampled_from(sorted(PASSAGES)),
)
CALLERS = st.lists(st.lists(CALL, min_size=2, max_size=4), min_size=3, max_size=5)


async def assert_holds(index: VectorIndex, callers: list[list[tuple[str, str, str]]], turns: Turns) -> None:
    history = History(turns)

    async def caller(calls: list[tuple[str, str, str]]) -> None:
        for name, document_id, version in calls:
            await CALLS[name](index, history, document_id, version)

    await turns.run(index.stage(HOME, [embedded("makes the collection", "v1", 0)]))
    watching = [("look", "", "")] * 8
    await turns.run(*(caller(calls) for calls in (*callers, watching)))
    await turns.run(everything_agrees(index, history))


async def everything_agrees(index: VectorIndex, history: History) -> None:
    """When nobody changes anything: what is listed is found, whole, and nothing else."""
    seen = await search(index)
    listed = {item.document_id: item for item in await index.documents(HOME, "", 10)}
    assert set(seen) == set(listed)
    for document_id in DOCUMENTS:
        check(history, document_id, seen.get(document_id, {}), history.turns.now)
        if document_id in listed:
            assert list(seen[document_id]) == [listed[document_id].version]
            assert len(await index.passages(HOME, [document_id])) == listed[document_id].passages
    assert await index.counts(HOME) == Counts(len(listed), sum(item.passages for item in listed.values()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CALLERS, st.randoms(use_true_random=False))
def test_a_qdrant_server_used_by_many(callers: list[list[tuple[str, str, str]]], random: Any) -> None:
    """Rows A1, A1b and A6: a document is old or new, whole, and found exactly when it is listed."""

    async def run() -> None:
        turns = Turns(lambda waiting: random.randrange(waiting))
        client = AsyncQdrantClient(":memory:")
        # Two replicas of the retriever.
        replicas = [ServerIndex(turns.through(client, sync=False), EMBEDDING, "memory") for _ in range(2)]
        await assert_holds(_Either(replicas), callers, turns)  # type: ignore[arg-type]
        await client.close()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Payload indexes have no effect in the local Qdrant")
        asyncio.run(run())


class _Either:
    """Calls go to one replica after another."""

    def __init__(self, replicas: list[ServerIndex]) -> None:
        self._next = itertools.cycle(replicas)

    def __getattr__(self, name: str) -> Any:
        return getattr(next(self._next), name)


class _Swept(EdgeStore):
    """Sweeps as the index does that calls it, in one step."""

    def sweep(self, older_than_s: float) -> None:
        for number in self.unsettled():
            self.sweep_one(number, older_than_s)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CALLERS, st.randoms(use_true_random=False))
def test_the_embedded_index_used_by_many(callers: list[list[tuple[str, str, str]]], random: Any) -> None:
    """Rows A1, A1b and A6, where each call is one step."""

    async def run(directory: str) -> None:
        store = _Swept(Path(directory), EMBEDDING, 1)
        turns = Turns(lambda waiting: random.randrange(waiting))
        try:
            await assert_holds(turns.through(store, sync=True), callers, turns)
        finally:
            store.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(directory))
