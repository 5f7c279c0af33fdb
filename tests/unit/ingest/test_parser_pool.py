"""Parsing in processes: deadline, memory, replacement, concurrency."""

from __future__ import annotations

import asyncio
import contextlib
import io
import tempfile
import time
from collections.abc import AsyncIterator

import pytest

from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import MediaType
from blockrag.ingest.parser_pool import ParserPool
from blockrag.ingest.parsing import parse
from blockrag.ingest.pipeline import SourceDocument
from tests.unit.ingest.reading import SPLITTER

# Takes more than ten seconds, and half a gigabyte on the way.
HEAVY = b"<p>" + b"a</p><p>" * 1_500_000


async def passages(pool: ParserPool, data: bytes, document_id: str = "a.html") -> list[str]:
    with tempfile.SpooledTemporaryFile(max_size=1 << 20) as spool:
        spool.write(data)
        async with pool.prepare(spool, SourceDocument(document_id), SPLITTER) as documents:  # type: ignore[arg-type]
            return [passage for document in documents for passage in document.passages]


@pytest.fixture
async def pool() -> AsyncIterator[ParserPool]:
    pool = ParserPool(workers=1, timeout_s=20, memory_mb=1024)
    yield pool
    await pool.close()


async def test_files_are_parsed_as_in_this_process(pool: ParserPool) -> None:
    assert await passages(pool, "# Prüfung\n\nText.".encode(), "a.md") == ["# Prüfung\n\nText."]
    assert await passages(pool, b'{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}', "r.jsonl") == ["one", "two"]
    async with pool.prepare(io.BytesIO(b"---\ntitle: T\ny: 1\n---\nx"), SourceDocument("a.md"), SPLITTER) as documents:
        (document,) = documents
    assert (document.title, document.metadata) == ("T", {"y": 1})


@pytest.mark.parametrize(
    ("data", "document_id", "here"),
    [
        (b"# T\n\ntext", "a.md", True),
        (b"text", "a.txt", True),
        (b"x" * (1 << 18), "a.txt", True),
        (b"x" * (1 << 18) + b"x", "a.txt", False),
        (b"x" * (1 << 14) + b"x", "a.md", False),
        (b"\xef\xbb\xbf\n---\ntitle: T\n---\nx", "a.md", False),
        (b"+++\na = 1\n+++\nx", "a.md", False),
        (b"<p>x</p>", "a.html", False),
        (b'{"id": "a", "text": "x"}', "a.jsonl", False),
    ],
)
async def test_only_what_cannot_take_long_is_parsed_here(
    pool: ParserPool, data: bytes, document_id: str, here: bool
) -> None:
    """Row B1: a thread is held by nothing whose time its size does not bound."""
    assert await passages(pool, data, document_id)
    assert (pool._idle == []) == here


@pytest.mark.parametrize(
    "pattern",
    [
        "|\n-\n* ",
        "* a-\n",
        "+\n\na\n- <!--",
        "--\n",
        "==\n",
        "  - a\n",
        "> ",
        "- ",
        "[",
        "](",
        "[a]: ",
        "`",
        "&",
        "\u00ad\n",
    ],
)
@pytest.mark.parametrize(("media_type", "size"), [(MediaType.MARKDOWN, 1 << 14), (MediaType.TEXT, 1 << 18)])
def test_what_is_parsed_here_cannot_take_long(pattern: str, media_type: MediaType, size: int) -> None:
    """Row B1: the slowest patterns of a random search over markup; the worst took 0.12 s."""
    data = (pattern * size).encode()[:size].decode("utf-8", "ignore").encode()
    started = time.thread_time()
    with contextlib.suppress(InvalidRequestError):
        parse(io.BytesIO(data), io.BytesIO(), media_type, {})
    assert time.thread_time() - started < 2


async def test_metadata_of_any_characters_reaches_the_process(pool: ParserPool) -> None:
    """As JSON a control character takes six bytes, and the kernel cuts messages of more than about 36 KiB."""
    source = SourceDocument("a.html", metadata={"a": "\x01" * 8100})
    async with pool.prepare(io.BytesIO(b"<p>one</p>"), source, SPLITTER) as documents:
        (document,) = documents
    assert document.metadata == source.metadata


async def test_errors_keep_their_field(pool: ParserPool) -> None:
    for data, document_id, field in (
        (b"\xff", "a.html", "content"),
        (b"", "a.html", "content"),
        (b"x", "a.exe", "media_type"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await passages(pool, data, document_id)
        assert caught.value.field == field
    assert await passages(pool, b"still here") == ["still here"]


async def test_a_file_that_takes_too_long_is_refused_and_the_next_goes_in() -> None:
    """Row B1: no upload can hold a thread beyond its deadline."""
    pool = ParserPool(workers=1, timeout_s=20, memory_mb=1024)
    try:
        assert await passages(pool, b"warm") == ["warm"]
        pool._timeout_s = 0.5
        started = time.monotonic()
        with pytest.raises(InvalidRequestError, match=r"content: reading it takes longer than the 0\.5 s"):
            await passages(pool, HEAVY, "a.html")
        assert time.monotonic() - started < 10
        pool._timeout_s = 20
        assert await passages(pool, b"next") == ["next"]
    finally:
        await pool.close()


async def test_a_file_that_takes_too_much_memory_is_refused_and_the_next_goes_in() -> None:
    """Row B1: the memory bound."""
    pool = ParserPool(workers=1, timeout_s=60, memory_mb=64)
    try:
        with pytest.raises(InvalidRequestError, match=r"content: .*64 MiB of memory"):
            await passages(pool, HEAVY, "a.html")
        assert await passages(pool, b"next") == ["next"]
    finally:
        await pool.close()


async def test_cancelling_ends_the_process_and_frees_its_place(pool: ParserPool) -> None:
    assert await passages(pool, b"warm") == ["warm"]
    task = asyncio.create_task(passages(pool, HEAVY, "a.html"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(task, 0.5)
    assert await asyncio.wait_for(passages(pool, b"next"), 15) == ["next"]


async def test_a_process_that_died_while_it_was_idle_costs_no_file(pool: ParserPool) -> None:
    assert await passages(pool, b"<p>first</p>") == ["first"]
    (idle,) = pool._idle
    idle._process.kill()
    idle._process.wait()
    assert await passages(pool, b"<p>second</p>") == ["second"]


async def test_more_files_than_processes(pool: ParserPool) -> None:
    found = await asyncio.gather(*(passages(pool, f"text {number}".encode()) for number in range(20)))
    assert found == [[f"text {number}"] for number in range(20)]
