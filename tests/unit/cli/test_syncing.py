"""Commands against a gateway's document service on this machine, with the real parser and an index by hand."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.client import BlockragClient
from blockrag.errors import BlockragError
from blockrag.gateway import validation
from blockrag.gateway.corpus import Corpus
from blockrag.gateway.leftovers import Leftovers
from blockrag.ingest.splitting import PassageSplitter
from blockrag.metadata import struct_of
from blockrag.results import Document
from blockrag.status import status_code
from blockrag.syncing import Sync
from blockrag.v1 import common_pb2, corpus_pb2_grpc, rag_pb2, rag_pb2_grpc
from blockrag.v1.common_pb2 import RequestContext
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer
from tests.unit.gateway.fakes import FakeCache, FakeIndex, preparing

CASES = Path(__file__).resolve().parents[2] / "data" / "cases"
CONTEXT = RequestContext(tenant="public")


class Gateway(corpus_pb2_grpc.CorpusServiceServicer, rag_pb2_grpc.RagServiceServicer):
    """The document service without Ray, and one found passage."""

    def __init__(self) -> None:
        splitter = PassageSplitter(TEST_TEMPLATE, make_tiny_tokenizer(), 64)
        self.index, self.cache = FakeIndex(), FakeCache()
        leftovers = Leftovers(self.index, self.cache, 3600.0)
        self._corpus = Corpus(self.index, preparing(splitter), 8, leftovers)

    async def IngestDocument(self, request: AsyncIterator[Any], context: Any) -> Any:
        messages = [message async for message in request]
        content = b"".join(message.content for message in messages)
        header = validation.check_header(messages[0].header)
        return await _told(context, self._corpus.ingest(header, io.BytesIO(content), CONTEXT))

    async def ListDocuments(self, request: Any, context: Any) -> Any:
        listed = self._corpus.list_documents(request.collection, request.page_size, request.page_token, CONTEXT)
        return await _told(context, listed)

    async def DeleteDocument(self, request: Any, context: Any) -> Any:
        return await _told(context, self._corpus.delete_document(request.collection, request.document_id, CONTEXT))

    async def DeleteSource(self, request: Any, context: Any) -> Any:
        return await _told(context, self._corpus.delete_source(request.collection, request.source, CONTEXT))

    async def Retrieve(self, request: rag_pb2.RetrieveRequest, context: Any) -> rag_pb2.RetrieveResponse:
        holder = common_pb2.PassageHolder(passage_id="q", document_id="[b]", title="B")
        passage = common_pb2.Passage(
            passage_id="p", document_id="[a]", text="[red]no[/] [/x]", metadata=struct_of({"year": 2024})
        )
        passage.also_in.append(holder)
        return rag_pb2.RetrieveResponse(passages=[passage])


async def _told(context: Any, work: Any) -> Any:
    try:
        return await work
    except BlockragError as error:
        await context.abort(status_code(error), str(error))


@pytest.fixture
def gateway() -> Iterator[tuple[Gateway, str]]:
    """Served by a thread of its own: commands bring their own event loop."""
    servicer, ready, address = Gateway(), threading.Event(), [""]
    loop = asyncio.new_event_loop()

    async def start() -> grpc.aio.Server:
        server = grpc.aio.server()
        corpus_pb2_grpc.add_CorpusServiceServicer_to_server(servicer, server)
        rag_pb2_grpc.add_RagServiceServicer_to_server(servicer, server)
        address[0] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        ready.set()
        return server

    def serve() -> None:
        server = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(server.stop(None))
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(30)
    yield servicer, address[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


def blockrag(gateway: tuple[Gateway, str], *arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments), "--target", gateway[1]], env={"COLUMNS": "300"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def outcomes(result: Result) -> dict[str, str]:
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line["document_id"]: line.get("outcome", "failed") for line in lines}


def test_a_collection_is_made_equal_to_a_jsonl_file(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    """Row C13: rows that left the file leave the collection, with their KV."""
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(CASES / "rows-v1.jsonl", rows)
    assert outcomes(blockrag(gateway, "ingest", "--sync", rows, "--json")) == {"r1": "created", "r2": "created"}
    shutil.copyfile(CASES / "rows-v2.jsonl", rows)

    planned = {"r1": "unchanged", "r2": "removed"}
    assert outcomes(blockrag(gateway, "ingest", "--sync", "--dry-run", rows, "--json")) == planned
    assert sorted(name for _, name in gateway[0].index.documents) == ["r1", "r2"]
    told = blockrag(gateway, "ingest", "--sync", "--dry-run", rows)
    assert "nothing was changed: 1 unchanged, 1 removed" in told.output
    assert outcomes(blockrag(gateway, "ingest", "--sync", rows, "--json")) == planned
    assert sorted(name for _, name in gateway[0].index.documents) == ["r1"]
    assert {name for _, name in gateway[0].cache.purged} == {"r2"}


def test_one_document_that_is_not_there_keeps_no_other_from_going(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(f"This is {name}.")
    blockrag(gateway, "ingest", tmp_path)
    told = blockrag(gateway, "delete", "a.txt", "gone.txt", "b.txt", code=1)
    assert "removed a.txt: 1 passages" in told.output and "removed b.txt" in told.output
    assert "failed gone.txt: there is no document 'gone.txt'" in told.output
    listed = json.loads(blockrag(gateway, "delete", "gone.txt", "c.txt", "--json", code=1).stdout)
    assert [("error" in item, item["document_id"]) for item in listed] == [(True, "gone.txt"), (False, "c.txt")]
    assert gateway[0].index.documents == {}


def test_a_folder_that_cannot_be_read_has_nothing_removed(
    gateway: tuple[Gateway, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    for name in ("a.txt", "locked/b.txt"):
        (tmp_path / name).write_text(f"This is {name}.")
    blockrag(gateway, "ingest", "--sync", tmp_path)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path) == str(locked):  # the tests may be root's, who may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = blockrag(gateway, "ingest", "--sync", tmp_path, code=1)
    assert f"paths: {locked} cannot be read: Permission denied" in refused.output
    assert sorted(name for _, name in gateway[0].index.documents) == ["a.txt", "locked/b.txt"]


async def test_a_file_that_failed_is_known_however_its_name_is_encoded() -> None:
    """As on file systems that decompose names: é is two characters there."""
    before = [Document("caf\u00e9.txt", "v", "", 1, {}, "caf\u00e9.txt")]
    plan = Sync(BlockragClient("127.0.0.1:1"), "work", before)
    plan.keep_all_of("cafe\u0301.txt")
    assert plan.gone() == []


def test_a_collection_is_made_equal_to_a_directory(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    """Row C13: of a file that fails, what it held stays."""
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(f"This is {name}.")
    shutil.copyfile(CASES / "rows-v1.jsonl", tmp_path / "rows.jsonl")
    blockrag(gateway, "ingest", "--sync", tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("It has changed.")
    (tmp_path / "c.txt").write_bytes(b"\x7fELF\x00")
    (tmp_path / "rows.jsonl").write_text("{broken")

    failed = blockrag(gateway, "ingest", "--sync", tmp_path, "--json", code=1)
    assert outcomes(failed) == {
        "a.txt": "removed",
        "b.txt": "replaced",
        "c.txt": "failed",
        "rows.jsonl": "failed",
    }
    assert sorted(name for _, name in gateway[0].index.documents) == ["b.txt", "c.txt", "r1", "r2"]


def test_what_came_from_a_file_is_deleted(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    """Row C13."""
    shutil.copyfile(CASES / "rows-v1.jsonl", tmp_path / "rows.jsonl")
    (tmp_path / "a.txt").write_text("Stays.")
    blockrag(gateway, "ingest", tmp_path)

    (removed,) = json.loads(blockrag(gateway, "delete", "--source", "rows.jsonl", "--json").stdout)
    assert removed["document_ids"] == ["r1", "r2"]
    assert sorted(name for _, name in gateway[0].index.documents) == ["a.txt"]
    assert "came from" in blockrag(gateway, "delete", "--source", "rows.jsonl", code=1).output


def test_text_is_printed_as_it_is(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    """Row B2: brackets in titles, ids, passages, errors and names of files are no markup."""
    blockrag(gateway, "ingest", CASES / "brackets.jsonl")
    listed = blockrag(gateway, "list", "-c", "default").output
    assert "What [/INST] means" in listed
    assert "Arrays: list[int]" in listed
    assert "[/INST]" in blockrag(gateway, "ingest", CASES / "duplicate-bracket-id.jsonl", code=1).output
    (tmp_path / "[").mkdir()
    (tmp_path / "[" / "x].md").write_bytes(b"\x7fELF\x00")
    (tmp_path / "[bold]y.md").write_text("Text.")
    assert "[/x].md" in blockrag(gateway, "ingest", tmp_path, code=1).output
    assert "[bold]y.md" in blockrag(gateway, "list", "-c", "default").output
    shown = blockrag(gateway, "retrieve", "q").output
    assert "[red]no[/] [/x]" in shown
    assert "[a]" in shown
    assert "[b]" in shown


def test_whole_numbers_are_printed_whole(gateway: tuple[Gateway, str]) -> None:
    """Row C11, and the documents that hold an equal passage."""
    (passage,) = json.loads(blockrag(gateway, "retrieve", "q", "--json").stdout)
    assert repr(passage["metadata"]) == "{'year': 2024}"
    assert [holder["document_id"] for holder in passage["also_in"]] == ["[b]"]
    assert '"year": 2024\n' in blockrag(gateway, "retrieve", "q", "--json").stdout


def test_no_command_writes_markup() -> None:
    """Row B2: the consoles print it as it is, so styles must be Text objects."""
    written = [
        f"{path.name}: {word}"
        for path in sorted((Path(validation.__file__).parents[1] / "cli").glob("*.py"))
        for word in ("[/]", "[red]", "[green]", "[bold]", "[dim]", "[yellow]", "[cyan]", "[bold red]", "markup import")
        if word in path.read_text(encoding="utf-8")
    ]
    assert written == []
