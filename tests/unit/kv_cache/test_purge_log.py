from __future__ import annotations

from blockrag.kv_cache.purge_log import Departed, PurgeJournal, process_start
from blockrag.kv_cache.shard_messages import DocumentId, PurgeLog

DOCUMENT = DocumentId("t", "c", "d")


def test_a_reader_gets_what_was_purged_since_its_cursor() -> None:
    journal = PurgeJournal(start=1000)
    journal.append(["a", "b"])
    assert journal.since(1000) == PurgeLog(1002, ["a", "b"], reset=False)
    assert journal.since(1001) == PurgeLog(1002, ["b"], reset=False)
    assert journal.since(1002) == PurgeLog(1002, [], reset=False)


def test_a_new_reader_forgets_everything_once() -> None:
    journal = PurgeJournal()
    first = journal.since(0)
    assert first.reset
    assert journal.since(first.cursor) == PurgeLog(first.cursor, [], reset=False)


def test_a_reader_that_fell_behind_forgets_everything() -> None:
    journal = PurgeJournal(capacity=3, start=10)
    journal.append("abcd")
    assert journal.since(10) == PurgeLog(14, [], reset=True)
    assert journal.since(11) == PurgeLog(14, ["b", "c", "d"], reset=False)


def test_a_reader_of_an_earlier_process_forgets_everything() -> None:
    """However many keys the new process has purged already, or the old one had."""
    old = PurgeJournal(start=process_start() - (1 << 16))
    old.append(str(number) for number in range(100))
    new = PurgeJournal()
    new.append(str(number) for number in range(50))
    assert new.since(old.since(0).cursor).reset
    ahead = PurgeJournal(start=5)
    assert ahead.since(6).reset


def test_reset_readers_reaches_every_reader() -> None:
    journal = PurgeJournal(start=10)
    journal.append("a")
    cursor = journal.since(10).cursor
    journal.reset_readers()
    answer = journal.since(cursor)
    assert answer.reset
    assert not journal.since(answer.cursor).reset


def test_departed_keys_are_taken_by_document() -> None:
    departed = Departed()
    other = DocumentId("t", "c", "other")
    departed.add("a", [DOCUMENT])
    departed.add("b", [DOCUMENT, other])
    departed.add("nobody's", [DocumentId("t", "", "")])
    assert set(departed.documents) == {DOCUMENT, other}
    assert departed.take(DOCUMENT) == {"a", "b"}
    assert departed.take(DOCUMENT) == set()
    assert departed.take(other) == set()


def test_departed_remembers_that_it_forgot() -> None:
    departed = Departed(capacity=2)
    for key in "ab":
        departed.add(key, [DOCUMENT])
    assert not departed.overflowed
    departed.add("a", [DOCUMENT])
    assert not departed.overflowed
    departed.add("c", [DOCUMENT])
    assert departed.overflowed
    assert departed.take(DOCUMENT) == {"a", "c"}
