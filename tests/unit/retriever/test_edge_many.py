"""The embedded index with many collections: few shards are open, and a sweep opens those that need it."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import qdrant_edge as qdrant

from blockrag.errors import InvalidRequestError, UnavailableError
from blockrag.identity import CollectionId
from blockrag.retriever import catalogue, edge_shards
from blockrag.retriever import payload as fields
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.edge_filters import equals, since
from blockrag.retriever.edge_store import EdgeStore
from tests.unit.retriever.passages import EMBEDDING, HOME, document, embedded, query

REPOSITORY = Path(__file__).resolve().parents[3]
MOST = 2
MANY = [CollectionId("tenant", f"collection-{number}") for number in range(5)]

# Shows a version of a document, then stages and commits another one, and kills itself within a call of its choice.
KILLED = """
import os, signal, sys
from pathlib import Path
from blockrag.retriever.edge_store import EdgeStore
from tests.unit.retriever.passages import EMBEDDING, HOME, document, embedded
store = EdgeStore(Path(sys.argv[1]), EMBEDDING, 10)
store.stage(HOME, [embedded("a", "v1", ordinal) for ordinal in range(2)])
store.commit(HOME, document("a", "v1", 2))
store.tidy(idle=True)
assert not store.unsettled()
owner, name, when = sys.argv[2].split()
owner = {"store": store, "shards": store._shards, "catalogue": store._catalogue}[owner]
call = getattr(owner, name)
def killed(*arguments):
    if when == "after":
        call(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, killed)
store.stage(HOME, [embedded("a", "v2", ordinal) for ordinal in range(2)])
store.commit(HOME, document("a", "v2", 2))
store.tidy(idle=True)
"""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_shards, "MOST_OPEN", MOST)


def fill(store: EdgeStore, collection: CollectionId, name: str = "a") -> None:
    store.stage(collection, [embedded(name, "v1", number, collection=collection) for number in range(2)])
    store.commit(collection, document(name, "v1", 2))


def is_found(store: EdgeStore, collection: CollectionId) -> bool:
    return {one.passage.passage_id for one in store.search(collection, query())} == {
        embedded("a", "v1", number, collection=collection).passage.passage_id for number in range(2)
    }


def settle(store: EdgeStore) -> None:
    while store.tidy(idle=True):
        pass


def waiting(store: EdgeStore, number: int) -> int:
    return store._count(number, qdrant.Filter(must=[since(2.0**40)]))


@pytest.mark.usefixtures("few")
def test_few_shards_are_open_and_all_are_there(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY:
        store.stage(collection, [embedded("b", "v1", 0, collection=collection)])
        fill(store, collection)
        assert len(store._shards) <= MOST
    assert all(is_found(store, collection) for collection in [*MANY, *reversed(MANY)])
    for collection in MANY:
        store.commit(collection, document("b", "v1", 1))
    assert [store.counts(collection).documents for collection in MANY] == [2] * len(MANY)
    assert len(store._shards) == MOST
    store.remove_collection(MANY[0])
    store.remove_collection(MANY[-1])
    store.close()
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    assert store.collections(None) == MANY[1:-1]
    assert [len(store.search(collection, query())) for collection in MANY[1:-1]] == [3] * (len(MANY) - 2)
    store.close()


@pytest.mark.usefixtures("few")
def test_what_changed_is_flushed_before_its_shard_is_closed(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY:
        fill(store, collection)
    closed = range(1, len(MANY) + 1 - MOST)
    assert not any(store._catalogue.unsynced(number) for number in closed)
    assert store._shards._unflushed.keys() == set(range(1, len(MANY) + 1)) - set(closed)
    store.close()


@pytest.mark.usefixtures("few")
def test_what_cannot_be_flushed_is_closed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    with monkeypatch.context() as broken:
        broken.setattr(store._catalogue, "mark_synced", lambda _: 1 / 0)
        for collection in MANY:
            fill(store, collection)
    assert store._catalogue.unsynced(1)
    assert all(is_found(store, collection) for collection in MANY)
    settle(store)
    assert not store._catalogue.unsynced_collections()
    store.close()


@pytest.mark.usefixtures("few")
def test_where_nothing_may_be_opened_what_is_open_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY:
        fill(store, collection)
    monkeypatch.setattr(catalogue, "CHANGES_MIB", 2**40)
    for collection in MANY[:-MOST]:
        with pytest.raises(UnavailableError, match="MiB free"):
            store.search(collection, query())
    assert all(is_found(store, collection) for collection in MANY[-MOST:])
    store.close()


def test_each_step_flushes_one_shard_that_changed(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY[:3]:
        fill(store, collection)
    left = []
    while store.tidy(idle=True):
        left.append(len(store._catalogue.unsynced_collections()))
    assert left == [2, 1]
    store.close()
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    assert is_found(store, MANY[0])
    assert not store._shards._unflushed, "nothing changed"
    store.close()


def test_what_cannot_be_flushed_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY[:2]:
        fill(store, collection)
    mark_synced = store._catalogue.mark_synced
    with monkeypatch.context() as broken:
        broken.setattr(store._catalogue, "mark_synced", lambda number: 1 / 0 if number == 1 else mark_synced(number))
        with pytest.raises(ZeroDivisionError):
            store.tidy(idle=True)
        store.tidy(idle=True)
        assert store._catalogue.unsynced_collections() == {1}
    settle(store)
    assert not store._catalogue.unsynced_collections()
    store.close()


def test_a_sweep_opens_what_may_have_something_to_sweep(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY[:4]:
        fill(store, collection)
    store.stage(MANY[1], [embedded("b", "v1", 0, collection=MANY[1])])
    assert store.unsettled() == [1, 2, 3, 4]
    settle(store)
    assert store.unsettled() == [2]
    store.close()

    store = EdgeStore(tmp_path, EMBEDDING, 0)
    assert store.unsettled() == [2]
    assert is_found(store, MANY[2])
    store.sweep_one(2)
    assert store.unsettled() == [2], "an upload may go on"
    assert 2 not in store._shards
    assert 3 in store._shards
    store.sweep_one(2, -1)
    assert store.unsettled() == []
    with pytest.raises(InvalidRequestError, match="0 of 1"):
        store.commit(MANY[1], document("b", "v1", 1))
    store.sweep_one(99)
    assert not (tmp_path / "shard-99").exists()
    store.close()


def test_an_index_of_before_is_swept_once(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY[:3]:
        fill(store, collection)
    store.stage(MANY[1], [embedded("b", "v1", 0, collection=MANY[1])])
    store.close()
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as database:
        database.execute("DROP TABLE unsettled")
    database.close()

    store = EdgeStore(tmp_path, EMBEDDING, 0)
    assert store.unsettled() == [1, 2, 3]
    for number in store.unsettled():
        store.sweep_one(number)
    assert store.unsettled() == [2]
    assert len(store._shards) == 0
    store.close()


@pytest.mark.parametrize(
    "moment",
    [
        "catalogue unsettle after",
        "shards update after",
        "store _mark before",
        "store _mark after",
        "catalogue put after",
        "store _remove_older before",
        "store _remove_older after",
        "shards flush before",
        "catalogue mark_synced before",
        "catalogue settle before",
        "catalogue settle after",
    ],
)
def test_whatever_a_killed_process_left_is_swept(tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == -signal.SIGKILL
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    (shown,) = store.documents(HOME, "", 10)
    for number in store.unsettled():
        store.sweep_one(number, -1)

    assert waiting(store, 1) == 0
    assert store._count(1, qdrant.Filter(must=[equals(fields.VERSION, shown.version)])) == 2
    assert store.documents(HOME, "", 10) == [shown]
    assert {one.passage.version for one in store.search(HOME, query())} == {shown.version}
    assert store.unsettled() == []
    store.close()


def test_a_commit_that_fails_half_way_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    fill(store, HOME)
    settle(store)
    store.stage(HOME, [embedded("b", "v1", 0)])
    with monkeypatch.context() as broken:
        broken.setattr(store._catalogue, "put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.commit(HOME, document("b", "v1", 1))
    settle(store)
    assert store.unsettled() == [1]
    assert waiting(store, 1) == 1
    store.sweep_one(1)
    assert waiting(store, 1) == 0
    assert store.unsettled() == []
    store.close()


async def test_a_shard_that_cannot_be_opened_leaves_the_others_to_be_swept(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for collection in MANY[:3]:
        store.stage(collection, [embedded("a", "v1", 0, collection=collection)])
    store.close()
    shutil.rmtree(tmp_path / "shard-2" / "segments")
    (tmp_path / "shard-2" / "segments").write_text("damaged")
    index = EdgeIndex(tmp_path, EMBEDDING)
    await index.sweep(older_than_s=-1)

    assert await index.call("unsettled") == [2]
    await index.close()
