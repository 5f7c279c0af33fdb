import os
from pathlib import Path

import grpc
import pytest
from rich.table import Table
from rich.tree import Tree

from blockrag.cli import console
from blockrag.cli.documents import _ingest, find_sources
from blockrag.client import BlockragClient
from blockrag.errors import InvalidRequestError
from blockrag.v1 import corpus_pb2_grpc
from tests.unit.handwritten_server import Server


def test_directories_are_searched_and_ids_are_paths_below_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.MD", "deep/c.pdf", "skipped.png", "deep/d.jsonl"):
        (tmp_path / name).write_text("text")
    assert [source.document_id for source in find_sources([tmp_path])] == [
        "a.MD",
        "b.txt",
        "deep/c.pdf",
        "deep/d.jsonl",
    ]


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    file = tmp_path / "notes.log"
    file.write_text("text")
    assert [(source.document_id, source.path) for source in find_sources([file])] == [("notes.log", file)]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="absent"):
        list(find_sources([tmp_path / "absent"]))


def test_two_files_with_one_id_are_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    """Row A4."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(name)
    for paths in (["one", "two"], ["one/README.md", "two/README.md"], ["one", "two/README.md"]):
        with pytest.raises(InvalidRequestError, match=r"one/README\.md and .*two/README\.md would both"):
            list(find_sources([tmp_path / path for path in paths]))
    assert [source.document_id for source in find_sources([tmp_path])] == ["one/README.md", "two/README.md"]


def test_a_file_that_is_named_twice_goes_in_once(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    assert [source.document_id for source in find_sources([tmp_path, tmp_path / "a.md"])] == ["a.md"]


def test_two_jsonl_files_of_one_name_would_share_their_source(tmp_path: Path) -> None:
    """Rows A4 and C13: their documents have ids of their own, but what came from one could not be told."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("")
    with pytest.raises(InvalidRequestError, match=r"would both be 'rows\.jsonl'"):
        list(find_sources([tmp_path / "one", tmp_path / "two"]))
    assert [source.document_id for source in find_sources([tmp_path])] == ["one/rows.jsonl", "two/rows.jsonl"]


def test_names_that_differ_only_in_their_encoding_are_one_id(tmp_path: Path) -> None:
    """Rows A4 and C4."""
    for name in ("ü.md", "u\u0308.md"):
        (tmp_path / name).write_text(name)
    with pytest.raises(InvalidRequestError, match="would both"):
        list(find_sources([tmp_path]))


async def test_a_name_that_is_not_utf8_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows B2 and B3: the reason is printed, the good files go in, a name like markup is a name."""
    for name in (b"bad\xe9.md", b"good.md", b"[x] :b:.md"):
        (tmp_path / os.fsdecode(name)).write_text("text")
    server = grpc.aio.server()
    answers = Server()
    corpus_pb2_grpc.add_CorpusServiceServicer_to_server(answers, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        sources = list(find_sources([tmp_path]))
        failed = await _ingest(BlockragClient(f"127.0.0.1:{port}"), sources, "notes", {}, syncing=False, as_json=True)
    finally:
        await server.stop(None)

    assert failed == 1
    sent = {messages[0].header.document_id for messages in answers.requests}
    assert sent == {"good.md", "[x] :b:.md"}
    printed = capsys.readouterr().out
    assert "bad\\\\udce9.md" in printed
    assert "is no Unicode text" in printed


@pytest.mark.parametrize("text", ["What [/INST] means", "list[int]", "[/x].md", "[red]no style[/]", ":smile: [link=x]"])
def test_text_is_printed_as_it_is(text: str) -> None:
    """Row B2."""
    table = Table(text, title=text)
    table.add_row(text)
    tree = Tree("root")
    tree.add(text)
    for printer in (console.out, console.err):
        for item in (text, table, tree):
            with printer.capture() as captured:
                printer.print(item)
            assert text in captured.get()
    bar = console.progress_bar()
    bar.add_task(text, total=1)
    with console.err.capture() as captured:
        console.err.print(bar.get_renderable())
    assert text in captured.get()
