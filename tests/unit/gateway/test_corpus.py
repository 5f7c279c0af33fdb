"""Documents in and out, with the real splitter and services by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from google.protobuf.struct_pb2 import Struct

from blockrag.errors import InvalidRequestError, NotFoundError, UnavailableError
from blockrag.gateway.corpus import Corpus
from blockrag.gateway.leftovers import Leftovers
from blockrag.gateway.validation import check_header
from blockrag.ingest.splitting import PassageSplitter
from blockrag.v1 import corpus_pb2
from blockrag.v1.common_pb2 import RequestContext
from blockrag.v1.corpus_pb2 import (
    INGEST_OUTCOME_CREATED,
    INGEST_OUTCOME_REPLACED,
    INGEST_OUTCOME_UNCHANGED,
    DocumentHeader,
)
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer

from .fakes import FakeCache, FakeIndex, preparing

CASES = Path(__file__).resolve().parents[2] / "data" / "cases"
CONTEXT = RequestContext(request_id="r1", tenant="acme")
LONG = " ".join(f"This is sentence number {number} of a long document." for number in range(200))


@pytest.fixture(scope="module")
def splitter() -> PassageSplitter:
    return PassageSplitter(TEST_TEMPLATE, make_tiny_tokenizer(), 64)


@pytest.fixture
def corpus(splitter: PassageSplitter) -> Corpus:
    index, cache = FakeIndex(), FakeCache()
    return Corpus(index, preparing(splitter), 8, Leftovers(index, cache, 3600.0))


def parts(corpus: Corpus) -> tuple[FakeIndex, FakeCache]:
    assert isinstance(corpus.index, FakeIndex)
    assert isinstance(corpus.leftovers.cache, FakeCache)
    return corpus.index, corpus.leftovers.cache


async def ingest(corpus: Corpus, content: str, document_id: str = "a.txt") -> corpus_pb2.IngestedDocument:
    metadata = Struct()
    metadata.update({"year": 1999})
    header = DocumentHeader(collection="default", document_id=document_id, metadata=metadata)
    (document,) = (await corpus.ingest(header, io.BytesIO(content.encode()), CONTEXT)).documents
    return document


async def test_a_new_document_is_staged_in_batches_and_committed(corpus: Corpus) -> None:
    index, cache = parts(corpus)
    document = await ingest(corpus, LONG)
    assert document.outcome == INGEST_OUTCOME_CREATED
    stored = index.documents[("default", "a.txt")]
    passages = index.staged[("default", "a.txt", document.version)]
    assert document.passages == stored.passages == len(passages) > 8
    assert index.calls.count("add_passages") == -(-len(passages) // 8)
    assert [passage.ordinal for passage in passages] == list(range(len(passages)))
    assert {passage.document_version for passage in passages} == {document.version}
    assert passages[0].metadata["year"] == 1999
    assert "".join(" ".join(passage.text for passage in passages).split()) == "".join(LONG.split())
    assert cache.purged == []


async def test_the_same_document_again_changes_nothing(corpus: Corpus) -> None:
    index, cache = parts(corpus)
    first = await ingest(corpus, LONG)
    index.calls.clear()
    again = await ingest(corpus, LONG)
    assert again.outcome == INGEST_OUTCOME_UNCHANGED
    assert again.passages == first.passages
    assert index.calls == ["scan_documents"]
    assert cache.purged == []


async def test_an_updated_document_replaces_and_purges(corpus: Corpus) -> None:
    index, cache = parts(corpus)
    first = await ingest(corpus, LONG)
    second = await ingest(corpus, "It is short now.")
    assert second.outcome == INGEST_OUTCOME_REPLACED
    assert second.version != first.version
    assert index.documents[("default", "a.txt")].passages == 1
    assert set(cache.purged) == {("default", "a.txt")}


@pytest.mark.parametrize("fail_on", ["add_passages", "commit_document"])
async def test_an_interrupted_ingest_shows_nothing_and_is_completed_by_another(corpus: Corpus, fail_on: str) -> None:
    index, _ = parts(corpus)
    index.fail_on = fail_on
    with pytest.raises(ConnectionError):
        await ingest(corpus, LONG)
    assert index.documents == {}
    index.fail_on = ""
    document = await ingest(corpus, LONG)
    assert document.outcome == INGEST_OUTCOME_CREATED
    assert len(index.staged[("default", "a.txt", document.version)]) == document.passages


async def test_a_jsonl_file_holds_many_documents(corpus: Corpus) -> None:
    lines = [{"id": f"d{number}", "text": f"Document number {number}."} for number in range(5)]
    header = DocumentHeader(collection="default", document_id="all.jsonl")
    content = "\n".join(json.dumps(line) for line in lines).encode()
    response = await corpus.ingest(header, io.BytesIO(content), CONTEXT)
    assert [document.document_id for document in response.documents] == ["d0", "d1", "d2", "d3", "d4"]


@pytest.mark.parametrize(
    ("document_id", "content"),
    [
        ("a.txt", b""),
        ("a.txt", b"  \n "),
        ("a.txt", b"\x7fELF\x00\x00"),
        ("a.pdf", b"%PDF-1.4 nothing"),
        ("a.bin", b"x"),
    ],
)
async def test_what_cannot_be_read_is_refused_and_stores_nothing(
    corpus: Corpus, document_id: str, content: bytes
) -> None:
    index, _ = parts(corpus)
    with pytest.raises(InvalidRequestError):
        await corpus.ingest(DocumentHeader(collection="default", document_id=document_id), io.BytesIO(content), CONTEXT)
    assert index.documents == {}
    assert index.staged == {}


async def test_metadata_must_be_small(corpus: Corpus) -> None:
    index, _ = parts(corpus)
    metadata = Struct()
    metadata.update({"note": "x" * 9000})
    header = DocumentHeader(collection="default", document_id="a.txt", metadata=metadata)
    with pytest.raises(InvalidRequestError, match=r"9\d\d\d bytes"):
        await corpus.ingest(header, io.BytesIO(b"text"), CONTEXT)
    assert index.staged == {}


async def test_deleting_purges_before_and_after(corpus: Corpus) -> None:
    _, cache = parts(corpus)
    stored = await ingest(corpus, LONG)
    removed = await corpus.delete_document("default", "a.txt", CONTEXT)
    assert removed.passages == stored.passages
    assert cache.purged == [("default", "a.txt")] * 2
    assert removed.purged_blocks == 4


async def test_deleting_a_collection(corpus: Corpus) -> None:
    _, cache = parts(corpus)
    await ingest(corpus, "One.", "a.txt")
    await ingest(corpus, "Two.", "b.txt")
    removed = await corpus.delete_collection("default", CONTEXT)
    assert removed.documents == 2
    assert cache.purged == [("default", "")] * 2


async def test_listing_pages_through_everything_once(corpus: Corpus) -> None:
    for number in range(7):
        await ingest(corpus, f"Text {number}.", f"d{number}.txt")
    seen, token, pages = [], "", 0
    while True:
        page = await corpus.list_documents("default", 3, token, CONTEXT)
        assert page.total == 7
        seen.extend(document.document_id for document in page.documents)
        pages += 1
        token = page.next_page_token
        if not token:
            break
    assert seen == [f"d{number}.txt" for number in range(7)]
    assert pages == 3
    named = await corpus.list_documents("default", 3, "", CONTEXT, ["d6.txt", "none.txt"])
    assert ([document.document_id for document in named.documents], named.next_page_token) == (["d6.txt"], "")
    with pytest.raises(InvalidRequestError, match="another collection"):
        token = (await corpus.list_documents("default", 3, "", CONTEXT)).next_page_token
        await corpus.list_documents("other", 3, token, CONTEXT)


@pytest.mark.parametrize("token", ["nonsense", "e30=", "W10=", "\u00e4", "WzEsMl0="])
async def test_a_page_token_of_somebody_elses_is_refused(corpus: Corpus, token: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await corpus.list_documents("default", 3, token, CONTEXT)
    assert refused.value.field == "page_token"


async def test_collections_are_listed(corpus: Corpus) -> None:
    await ingest(corpus, "One.")
    assert [item.name for item in (await corpus.list_collections(CONTEXT)).collections] == ["default"]


async def test_a_dry_run_says_what_an_ingest_would_do_and_does_nothing(corpus: Corpus) -> None:
    """Row C13."""
    index, cache = parts(corpus)

    async def dry(text: str) -> corpus_pb2.IngestedDocument:
        header = DocumentHeader(collection="default", document_id="a.txt", dry_run=True)
        (document,) = (await corpus.ingest(header, io.BytesIO(text.encode()), CONTEXT)).documents
        return document

    planned = await dry(LONG)
    assert (planned.outcome, index.documents, index.staged) == (INGEST_OUTCOME_CREATED, {}, {})
    header = DocumentHeader(collection="default", document_id="a.txt")
    (stored,) = (await corpus.ingest(header, io.BytesIO(LONG.encode()), CONTEXT)).documents
    assert (stored.version, stored.passages) == (planned.version, planned.passages)
    assert (await dry(LONG)).outcome == INGEST_OUTCOME_UNCHANGED
    assert (await dry("Other.")).outcome == INGEST_OUTCOME_REPLACED
    assert index.documents[("default", "a.txt")].version == stored.version
    assert cache.purged == []


async def test_documents_are_deleted_by_their_source(corpus: Corpus) -> None:
    """Row C13: what came from a file goes, with its KV; what came from elsewhere stays."""
    index, cache = parts(corpus)
    rows = (CASES / "rows-v1.jsonl").read_bytes()
    await corpus.ingest(DocumentHeader(collection="default", document_id="rows.jsonl"), io.BytesIO(rows), CONTEXT)
    named = DocumentHeader(collection="default", document_id="r3.txt", source="by hand")
    await corpus.ingest(named, io.BytesIO(b"Water is free."), CONTEXT)
    page = await corpus.list_documents("default", 10, "", CONTEXT)
    assert [item.source for item in page.documents] == ["rows.jsonl", "rows.jsonl", "by hand"]

    removed = await corpus.delete_source("default", "rows.jsonl", CONTEXT)
    assert (list(removed.document_ids), removed.passages) == (["r1", "r2"], 2)
    assert set(index.documents) == {("default", "r3.txt")}
    assert {document_id for _, document_id in cache.purged} == {"r1", "r2"}
    with pytest.raises(NotFoundError, match=r"came from 'rows\.jsonl'"):
        await corpus.delete_source("default", "rows.jsonl", CONTEXT)


async def test_another_source_is_another_version(corpus: Corpus) -> None:
    outcomes = []
    for source in ("one", "one", "two", ""):
        header = DocumentHeader(collection="default", document_id="a.txt", source=source)
        (document,) = (await corpus.ingest(header, io.BytesIO(b"Text."), CONTEXT)).documents
        outcomes.append(document.outcome)
    created, unchanged, replaced = INGEST_OUTCOME_CREATED, INGEST_OUTCOME_UNCHANGED, INGEST_OUTCOME_REPLACED
    assert outcomes == [created, unchanged, replaced, replaced]


@pytest.mark.parametrize(("key", "number"), [("price", float("nan")), ("ticket", 1234567890123456789.0)])
async def test_numbers_that_cannot_be_kept_are_refused_by_their_key(corpus: Corpus, key: str, number: float) -> None:
    """Rows A7 and B4, over gRPC."""
    metadata = Struct()
    metadata.update({key: number})
    header = DocumentHeader(collection="default", document_id="a.txt", metadata=metadata)
    with pytest.raises(InvalidRequestError, match=f"'{key}'") as refused:
        check_header(header)
    assert refused.value.field == "metadata"
    with pytest.raises(InvalidRequestError, match=f"'{key}'"):
        await corpus.ingest(header, io.BytesIO(b"text"), CONTEXT)


async def test_big_integers_of_a_jsonl_file_are_refused_before_anything_is_stored(corpus: Corpus) -> None:
    """Row A7."""
    index, _ = parts(corpus)
    content = (CASES / "big-integers.jsonl").read_bytes()
    with pytest.raises(InvalidRequestError, match=r"line 1.*'ticket'"):
        await corpus.ingest(DocumentHeader(collection="d", document_id="x.jsonl"), io.BytesIO(content), CONTEXT)
    assert index.staged == {}


async def test_an_ingest_that_a_removal_disturbed_may_be_sent_again(corpus: Corpus) -> None:
    """Row A1: to the client it is no mistake of its own."""

    async def too_few(request: object) -> object:
        raise InvalidRequestError("passages", "only 0 of 1 passages are staged")

    corpus.index.commit_document = too_few  # type: ignore[method-assign,assignment]
    with pytest.raises(UnavailableError, match="send it again"):
        await ingest(corpus, "Text.")
