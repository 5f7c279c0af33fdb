"""Received files → prepared documents."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import InvalidRequestError
from blockrag.ingest.pipeline import SourceDocument
from blockrag.ingest.splitting import PassageSplitter
from tests.unit.ingest.reading import SPLITTER, prepare, prepare_documents
from tests.unit.ingest.tokenizers import TEMPLATE, WordTokenizer

REPOSITORY = Path(__file__).resolve().parents[3]


def lines(*documents: Any) -> str:
    return "\n".join(json.dumps(document) for document in documents) + "\n"


def test_a_text_file() -> None:
    ((document, passages),) = prepare("Hello world.", "notes/my_notes.txt", metadata={"year": 2000})

    assert (document.document_id, document.title, document.passage_title) == ("notes/my_notes.txt",) + ("my notes",) * 2
    assert document.metadata == {"year": 2000}
    assert passages == ["Hello world."]
    assert document.passage_title == document.title


def test_the_given_title_goes_first() -> None:
    assert prepare("# Heading\n\ntext", "a.md", title=" Given\n title ")[0][0].title == "Given title"


def test_a_long_title_is_kept_whole_for_the_document() -> None:
    title = " ".join(["word"] * 50)
    ((document, passages),) = prepare("Hello world.", title=title)

    assert document.title == title
    assert document.passage_title != document.title
    assert document.passage_title.endswith("…")
    assert len(TEMPLATE.passage_ids(WordTokenizer(), document.passage_title, passages[0])) <= 32


def test_the_version_is_made_of_everything_that_passages_depend_on() -> None:
    base = prepare("text")[0][0].version
    others = [
        prepare("texts"),
        prepare("text", title="t"),
        prepare("text", metadata={"a": 1}),
        prepare("text", media_type="text/markdown"),
    ]
    splitter = PassageSplitter(TEMPLATE, WordTokenizer(), 33)
    with prepare_documents(io.BytesIO(b"text"), SourceDocument("a.txt"), splitter) as prepared:
        changed = next(prepared).version
    versions = [base, changed, *(prepared[0][0].version for prepared in others)]

    assert len(set(versions)) == 6
    assert prepare("text")[0][0].version == base
    assert (
        prepare("text", metadata={"a": 1, "b": 2})[0][0].version
        == prepare("text", metadata={"b": 2, "a": 1})[0][0].version
    )
    assert len(base) == 64


def test_jsonl_has_a_document_in_each_line() -> None:
    data = lines(
        {"id": "one", "title": "First", "text": "Text\u0000 one.", "metadata": {"a": 2}},
        {"id": 2, "text": "Text two."},
    ).replace("\n", "\n\n", 1)
    first, second = prepare("\ufeff" + data, "rows.jsonl", metadata={"a": 1, "b": 1})

    assert [first[0].document_id, second[0].document_id] == ["one", "2"]
    assert [first[0].title, second[0].title] == ["First", "2"]
    assert [first[0].metadata, second[0].metadata] == [{"a": 2, "b": 1}, {"a": 1, "b": 1}]
    assert [first[1], second[1]] == [["Text one."], ["Text two."]]


def test_documents_of_a_jsonl_file_may_be_skipped() -> None:
    data = lines(*({"id": str(number), "text": "some text " * 50} for number in range(5)))
    with prepare_documents(io.BytesIO(data.encode()), SourceDocument("rows.jsonl"), SPLITTER) as prepared:
        found = [len(list(document.passages)) if int(document.document_id) % 2 else 0 for document in prepared]

    assert found == [0, 4, 0, 4, 0]


GOOD = {"id": "x", "text": "y"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        (json.dumps({"text": "y"}), '"id" must be a string'),
        (json.dumps({"id": True, "text": "y"}), '"id" must be a string'),
        (json.dumps({"id": "", "text": "y"}), '"id": must not be empty'),
        (json.dumps({"id": "z", "text": 5}), '"text" must be a string'),
        (json.dumps({"id": "z", "text": "  "}), '"text" must be a string that is not empty'),
        (json.dumps({"id": "z", "text": "\uffff"}), '"text" must be a string that is not empty'),
        (json.dumps({"id": "z", "text": "y", "title": 1}), '"title" must be a string'),
        (json.dumps({"id": "z", "text": "y", "title": "x" * 1025}), '"title" has 1025 characters; at most 1024'),
        (json.dumps({"id": "z", "text": "y", "metadata": []}), '"metadata" must be an object'),
        (json.dumps({"id": "z", "text": "y", "body": ""}), "unknown key 'body'"),
        ('{"id": "z", "text": "y", "metadata": {"a": NaN}}', "NaN"),
        ('{"id": "z", "text": "\\ud800"}', "surrogate"),
        (json.dumps({"id": "x", "text": "again"}), "same id as line 1"),
        ('{"id": "z", "metadata": ' + '{"a":' * 5000 + "1", "not JSON"),
    ],
)
def test_a_malformed_line_is_named_before_anything_is_stored(line: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        prepare(lines(GOOD) + line + "\n", "rows.jsonl")
    assert caught.value.field == "content"
    assert "line 2" in caught.value.problem


@pytest.mark.parametrize(
    ("data", "document_id", "options", "field"),
    [
        (b"", "a.txt", {}, "content"),
        (b"text", "", {}, "document_id"),
        (b"text", "a\x00.txt", {}, "document_id"),
        (b"text", "a.exe", {}, "media_type"),
        (b"text", "a.txt", {"media_type": "video/mp4"}, "media_type"),
        (b"text", "a.txt", {"metadata": {"a": float("nan")}}, "metadata"),
        (b"text", "a.txt", {"metadata": {"a": b"bytes"}}, "metadata"),
        (b"\xff text", "a.txt", {}, "content"),
        (b"\x00\x01\x02" * 100, "a.md", {}, "content"),
        (b" ", "a.txt", {}, "content"),
        (b"\n\n", "a.jsonl", {}, "content"),
    ],
)
def test_bad_input_names_its_field(data: bytes, document_id: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prepare(data, document_id, **options)
    assert caught.value.field == field


# Splits a parsed text of 50 MB and prints how much memory that took. The words are counted by a stand-in: tokenising
# would take a minute here, and needs no memory that grows.
MEASURE = """
import resource, sys, tempfile
from blockrag.ingest.parsing import ParsedFile
from blockrag.ingest.pipeline import SourceDocument, check_source, documents_of
from blockrag.ingest.splitting import PassageSplitter
from tests.unit.ingest.tokenizers import TEMPLATE, WordTokenizer
line = "The quick brown fox jumps over the lazy dog and runs into the deep green wood. " * 5
with tempfile.SpooledTemporaryFile(max_size=1 << 20) as spool:
    paragraph = sys.argv[2].format(line).encode()
    for _ in range(50_000_000 // len(paragraph)):
        spool.write(paragraph)
    splitter = PassageSplitter(TEMPLATE, WordTokenizer(), 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passages = 0
    checked = check_source(SourceDocument(sys.argv[1]))
    for document in documents_of(ParsedFile("", ""), spool, checked, splitter):
        for passage in document.passages:
            passages += 1
print(passages, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("document_id", "pattern"),
    [("one-line.txt", "{0}"), ("paragraphs.txt", "{0}\n\n")],
)
def test_fifty_megabytes_need_little_memory(document_id: str, pattern: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, document_id, pattern],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        timeout=290,
    )
    passages, kilobytes = map(int, result.stdout.split())

    assert passages > 50_000
    assert kilobytes < 200_000
