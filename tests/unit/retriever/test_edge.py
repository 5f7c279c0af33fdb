"""The embedded index: durability, its process, its directory."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from blockrag.errors import DataError, SettingsError, UnavailableError
from blockrag.identity import CollectionId
from blockrag.retriever import edge_shards
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.edge_store import EdgeStore
from blockrag.retriever.vector_index import Counts, EmbeddingInfo
from tests.unit.retriever.passages import EMBEDDING, HOME, document, embedded, query

REPOSITORY = Path(__file__).resolve().parents[3]

# Stages and commits documents one after another, and says so, until it is killed.
WRITER = """
import sys
from pathlib import Path
from blockrag.retriever.edge_store import EdgeStore
from tests.unit.retriever.passages import EMBEDDING, HOME, document, embedded
store = EdgeStore(Path(sys.argv[1]), EMBEDDING, 10)
for number in range(10_000):
    name = f"doc{number:05d}"
    for start in range(0, 20, 5):
        store.stage(HOME, [embedded(name, "v1", ordinal) for ordinal in range(start, start + 5)])
        print("staged", name, flush=True)
    store.commit(HOME, document(name, "v1", 20))
    print("committed", name, flush=True)
"""


async def write(index: EdgeIndex, document_id: str, version: str = "v1", count: int = 3) -> None:
    await index.stage(HOME, [embedded(document_id, version, number) for number in range(count)])
    await index.commit(HOME, document(document_id, version, count))


async def test_everything_is_there_after_closing_and_opening(tmp_path: Path) -> None:
    first = EdgeIndex(tmp_path, EMBEDDING)
    await write(first, "a")
    await first.stage(HOME, [embedded("b", "v1", 0)])
    await first.close()
    second = EdgeIndex(tmp_path, EMBEDDING)

    assert len(await second.search(HOME, query())) == 3
    assert await second.counts(HOME) == Counts(1, 3)
    await second.commit(HOME, document("b", "v1", 1))
    assert await second.counts(HOME) == Counts(2, 4)
    await second.close()


@pytest.mark.parametrize("last_words", ["staged doc00000", "staged doc00003", "committed doc00002"])
def test_nothing_that_was_committed_is_lost_when_the_process_is_killed(tmp_path: Path, last_words: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as writer:
        assert writer.stdout is not None
        committed = []
        for line in writer.stdout:
            event, name = line.split()
            committed += [name] if event == "committed" else []
            if line.strip() == last_words:
                break
        writer.kill()
        committed += [line.split()[1] for line in writer.stdout if line.startswith("committed") and "\n" in line]
    store = EdgeStore(tmp_path, EMBEDDING, 10)

    shown = [item.document_id for item in store.documents(HOME, "", 100)]
    # The killed process may have committed one more than it could say.
    assert shown[: len(committed)] == committed
    assert len(shown) <= len(committed) + 1
    for name in shown:
        assert [passage.ordinal for passage in store.passages(HOME, [name])] == list(range(20))
    # Run again, it completes: no duplicate, no loss.
    for number in range(6):
        name = f"doc{number:05d}"
        store.stage(HOME, [embedded(name, "v1", ordinal) for ordinal in range(20)])
        store.commit(HOME, document(name, "v1", 20))
    assert store.counts(HOME).documents == max(6, len(shown))
    assert len(store.search(HOME, query(limit=1000, candidates=1000))) == store.counts(HOME).passages
    store.close()


async def test_a_worker_that_dies_is_started_again(tmp_path: Path) -> None:
    index = EdgeIndex(tmp_path, EMBEDDING)
    await write(index, "a")
    os.kill(worker_pid(index), signal.SIGKILL)
    # The call may meet the dying worker or the next one.
    for _ in range(2):
        try:
            counts = await index.counts(HOME)
            break
        except UnavailableError as error:
            assert "stopped" in str(error)

    assert counts == Counts(1, 3)
    assert len(await index.search(HOME, query())) == 3
    await index.close()


async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    index = EdgeIndex(tmp_path, EMBEDDING, hang_s=1.0)
    await write(index, "a")
    hung = worker_pid(index)
    os.kill(hung, signal.SIGSTOP)
    async with asyncio.timeout(10):
        with pytest.raises(UnavailableError, match="stopped"):
            await index.counts(HOME)
    assert await index.counts(HOME) == Counts(1, 3)
    assert worker_pid(index) != hung
    await asyncio.sleep(1.5)  # longer than hang_s: a worker that nobody asks is no worker that hangs
    assert await index.counts(HOME) == Counts(1, 3)
    await index.close()


async def test_the_worker_ends_with_its_owner_and_lets_the_directory_go(tmp_path: Path) -> None:
    owner = (
        "import asyncio, sys; from pathlib import Path\n"
        "from blockrag.retriever.edge import EdgeIndex\n"
        "from tests.unit.retriever.passages import EMBEDDING\n"
        "async def main():\n"
        "    index = EdgeIndex(Path(sys.argv[1]), EMBEDDING)\n"
        "    await index.collections(None)\n"
        "    print('open', flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", owner, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        held = EdgeIndex(tmp_path, EMBEDDING, lock_wait_s=0)
        with pytest.raises(UnavailableError, match="in use by another process"):
            await held.collections(None)
        process.kill()
    index = EdgeIndex(tmp_path, EMBEDDING, lock_wait_s=20)

    assert await index.collections(None) == []
    await index.close()


async def test_the_event_loop_stays_free_while_the_engine_works(tmp_path: Path) -> None:
    """Qdrant's engine holds Python's lock: in this process nothing else would run meanwhile."""
    index = EdgeIndex(tmp_path, EMBEDDING)
    await index.collections(None)
    staging = asyncio.create_task(index.stage(HOME, [embedded("a", "v1", number) for number in range(4000)]))
    turns = 0
    while not staging.done():
        await asyncio.sleep(0.001)
        turns += 1

    assert turns > 20
    await index.close()


async def test_cancelled_calls_do_not_confuse_the_next_ones(tmp_path: Path) -> None:
    index = EdgeIndex(tmp_path, EMBEDDING)
    await write(index, "a")
    calls = [asyncio.create_task(index.search(HOME, query(limit=number))) for number in range(1, 4)]
    await asyncio.sleep(0)
    calls[0].cancel()
    calls[1].cancel()

    assert len(await calls[2]) == 3
    assert await index.counts(HOME) == Counts(1, 3)
    await index.close()


async def test_a_call_that_cannot_be_sent_takes_no_other_calls_answer(tmp_path: Path) -> None:
    index = EdgeIndex(tmp_path, EMBEDDING)
    await write(index, "a")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        await index.call("counts", lambda: None)

    assert await asyncio.wait_for(index.counts(HOME), 5) == Counts(1, 3)
    await index.close()


async def test_another_embedding_model_is_refused(tmp_path: Path) -> None:
    index = EdgeIndex(tmp_path, EMBEDDING)
    await write(index, "a")
    await index.close()
    for other in (EmbeddingInfo("other", EMBEDDING.dimensions), EmbeddingInfo(EMBEDDING.fingerprint, 9)):
        changed = EdgeIndex(tmp_path, other)
        with pytest.raises(SettingsError, match="embedding model"):
            await changed.collections(None)


async def test_a_damaged_catalogue_is_named(tmp_path: Path) -> None:
    (tmp_path / "catalogue.sqlite").write_bytes(b"this is no database" * 100)
    index = EdgeIndex(tmp_path, EMBEDDING)

    with pytest.raises(DataError, match=r"catalogue\.sqlite"):
        await index.collections(None)


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    index = EdgeIndex(tmp_path / "file" / "index", EMBEDDING)

    with pytest.raises(UnavailableError, match="file"):
        await index.collections(None)


def test_leftovers_of_removed_collections_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "shard-77").mkdir()
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    store.stage(HOME, [embedded("a", "v1", 0)])
    store.commit(HOME, document("a", "v1", 1))
    (directory,) = tmp_path.glob("shard-*")
    store.remove_collection(HOME)

    assert not directory.exists()
    store.close()


def test_a_collection_that_was_being_made_is_made(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    number = store._catalogue.add_collection(HOME, "en")
    store.close()
    (tmp_path / f"shard-{number}" / "segments").mkdir(parents=True)
    store = EdgeStore(tmp_path, EMBEDDING, 0)

    assert store.search(HOME, query()) == []
    store.close()


def test_a_document_whose_passages_did_not_reach_the_disk_is_forgotten(tmp_path: Path) -> None:
    """As after a power failure: the catalogue was written, the last changes of the shard were not."""
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for name in ("kept", "lost"):
        store.stage(HOME, [embedded(name, "v1", number) for number in range(3)])
        store.commit(HOME, document(name, "v1", 3))
    store.close()
    (number,) = store_numbers(tmp_path)
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as database:
        database.execute("UPDATE documents SET synced = 0")
        database.execute("UPDATE documents SET passages = 4 WHERE document_id = 'lost'")
    database.close()
    store = EdgeStore(tmp_path, EMBEDDING, 0)

    assert [item.document_id for item in store.documents(HOME, "", 10)] == ["kept"]
    assert number == 1
    store.close()


def test_flushing_marks_documents_as_synced(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    store.stage(HOME, [embedded("a", "v1", 0)])
    store.commit(HOME, document("a", "v1", 1))
    assert store._catalogue.unsynced(1)

    store.tidy(idle=False)
    assert store._catalogue.unsynced(1), "too early"
    store.tidy(idle=True)
    assert not store._catalogue.unsynced(1)
    store.close()


def test_segments_are_optimized_after_many_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_shards, "OPTIMIZE_AFTER_POINTS", 100)
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    store.stage(HOME, [embedded("a", "v1", number) for number in range(150)])
    store.commit(HOME, document("a", "v1", 150))
    assert store._shards._changed_points == {1: 150}

    store.tidy(idle=True)
    assert not store._shards._changed_points
    assert len(store.search(HOME, query(limit=200, candidates=200))) == 150
    store.close()


def test_collections_of_two_tenants_have_their_own_shards(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, EMBEDDING, 0)
    for tenant in ("one", "two"):
        collection = CollectionId(tenant, "same")
        store.stage(collection, [embedded("a", "v1", 0, collection=collection)])

    assert len(list(tmp_path.glob("shard-*"))) == 2
    store.close()


def worker_pid(index: EdgeIndex) -> int:
    assert index._worker is not None
    return index._worker._process.pid


def store_numbers(path: Path) -> list[int]:
    return [int(directory.name.removeprefix("shard-")) for directory in path.glob("shard-*")]
