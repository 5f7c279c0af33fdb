"""The retriever's RPCs on the real embedding model and the real embedded index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Value

from blockrag.errors import InvalidRequestError, NotFoundError, SettingsError
from blockrag.retriever import rpcs
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.embedding import Embedder, find_embedding
from blockrag.retriever.rpcs import RetrieverService, check_settings, open_index
from blockrag.retriever.server import ServerIndex
from blockrag.settings import RetrieverSettings, Settings
from blockrag.v1 import common_pb2
from blockrag.v1 import retriever_pb2 as pb
from tests.unit.retriever.passages import EMBEDDING

TEXTS = {
    "norway.md": ["Oslo is the capital of Norway.", "The fjords of Norway are deep and were cut by glaciers."],
    "peru.md": ["Lima is the capital of Peru.", "Potatoes were first grown high in the Andes of Peru."],
    "tuvalu.md": ["Funafuti is the capital of Tuvalu, a country of nine islands in the Pacific."],
}
YEARS = {"norway.md": 1905, "peru.md": 1821, "tuvalu.md": 1978}


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RetrieverService]:
    embedder = Embedder(find_embedding(""))
    index = EdgeIndex(tmp_path_factory.mktemp("index"), embedder.info)
    made = RetrieverService(index, embedder, RetrieverSettings())
    await made.start()
    for document_id in TEXTS:
        await ingest(made, document_id)
    yield made
    await index.close()


def context(tenant: str = "public") -> common_pb2.RequestContext:
    return common_pb2.RequestContext(request_id="r1", tenant=tenant)


def passages(name: str, **changes: Any) -> list[common_pb2.Passage]:
    made = []
    for ordinal, text in enumerate(TEXTS[name]):
        fields = {"document_id": name, "document_version": "v1", "ordinal": ordinal, "text": text}
        passage = common_pb2.Passage(**{**fields, "title": name.removesuffix(".md"), **changes})
        passage.metadata.update({"year": YEARS[name], "nested": {"ok": True}})
        made.append(passage)
    return made


async def ingest(service: RetrieverService, document_id: str, collection: str = "", tenant: str = "public") -> None:
    sent = passages(document_id)
    await service.AddPassages(pb.AddPassagesRequest(context=context(tenant), collection=collection, passages=sent))
    commit = pb.CommitDocumentRequest(
        context=context(tenant),
        collection=collection,
        document_id=document_id,
        version="v1",
        title=document_id.removesuffix(".md"),
        metadata=sent[0].metadata,
        passages=len(sent),
    )
    await service.CommitDocument(commit)


IN = common_pb2.CONDITION_OPERATOR_IN


def equals(key: str, text: str) -> common_pb2.MetadataCondition:
    return common_pb2.MetadataCondition(key=key, operator=IN, values=[Value(string_value=text)])


def search(query: str, top_k: int = 3, **fields: Any) -> pb.SearchRequest:
    return pb.SearchRequest(context=context(), query=query, top_k=top_k, **fields)


@pytest.mark.parametrize(
    ("question", "document_id", "ordinal"),
    [
        ("What is the capital of Norway?", "norway.md", 0),
        ("Where do tubers come from?", "peru.md", 1),
        ("valleys carved by ice", "norway.md", 1),
        ("Funafuti", "tuvalu.md", 0),
        ("lima", "peru.md", 0),
    ],
)
async def test_the_best_passage_answers_the_question(
    service: RetrieverService, question: str, document_id: str, ordinal: int
) -> None:
    response = await service.Search(search(question))

    best = response.passages[0]
    assert (best.document_id, best.ordinal) == (document_id, ordinal)
    assert best.text == TEXTS[document_id][ordinal]
    assert best.title == document_id.removesuffix(".md")
    assert best.document_version == "v1"
    assert dict(best.metadata) == {"year": YEARS[document_id], "nested": best.metadata["nested"]}
    scores = [passage.score for passage in response.passages]
    assert scores == sorted(scores, reverse=True)


async def test_large_top_k_gives_what_there_is(service: RetrieverService) -> None:
    assert len((await service.Search(search("capital", top_k=10_000))).passages) == 5


async def test_a_search_tells_the_collections_language(service: RetrieverService) -> None:
    sent = [common_pb2.Passage(document_id="a", document_version="v1", ordinal=0, text="Die Prüfung der Räume.")]
    adding = pb.AddPassagesRequest(context=context(), collection="deutsch", passages=sent, language="german")
    await service.AddPassages(adding)
    assert (await service.Search(search("Prüfungen", collection="deutsch"))).language == "german"
    assert (await service.Search(search("capital"))).language == "english"
    await service.RemoveCollection(pb.RemoveCollectionRequest(context=context(), collection="deutsch"))


async def test_filters_restrict_the_search(service: RetrieverService) -> None:
    condition = common_pb2.MetadataCondition(key="year", operator=common_pb2.CONDITION_OPERATOR_AT_LEAST)
    condition.values.add(number_value=1900)
    response = await service.Search(search("capital", filter=[condition]))

    assert {passage.document_id for passage in response.passages} == {"norway.md", "tuvalu.md"}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (search(""), "query"),
        (search(" \n "), "query"),
        (search("x", top_k=0), "top_k"),
        (search("x", collection="no/slash"), "collection"),
        (search("x", filter=[common_pb2.MetadataCondition()]), "filter[0].key"),
        (search("Pru\u0308fung"), "query"),
        (search("hail\u00adstorm"), "query"),
        (search("x", filter=[equals("u\u0308", "x")]), "filter"),
        (search("x", filter=[equals("k", "u\u0308")]), "filter"),
    ],
)
async def test_bad_searches(service: RetrieverService, request_: pb.SearchRequest, field: str) -> None:
    """Rows C3 and C4, called alone: what is written in another way than the gateway writes it would find nothing."""
    with pytest.raises(InvalidRequestError) as caught:
        await service.Search(request_)
    assert caught.value.field == field


async def test_unknown_collection(service: RetrieverService) -> None:
    with pytest.raises(NotFoundError, match="'nothing'"):
        await service.Search(search("x", collection="nothing"))
    with pytest.raises(NotFoundError, match="'default'"):
        await service.Search(pb.SearchRequest(context=context("acme"), query="x", top_k=1))


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ([], "passages"),
        (passages("norway.md") * 129, "passages"),
        (passages("norway.md") + passages("peru.md"), "passages"),
        (passages("norway.md") + passages("norway.md", document_version="v2"), "passages"),
        (passages("norway.md", ordinal=1), "passages"),
        (passages("norway.md", text=" "), "passages"),
        (passages("norway.md", text="die Pru\u0308fung"), "passages"),
        (passages("norway.md", title="hail\u200bstorm"), "passages"),
        (passages("norway.md", document_id="u\u0308.md"), "document_id"),
        (passages("norway.md", document_id=""), "document_id"),
        (passages("norway.md", document_version=""), "version"),
    ],
)
async def test_bad_passages(service: RetrieverService, sent: list[common_pb2.Passage], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await service.AddPassages(pb.AddPassagesRequest(context=context(), collection="bad", passages=sent))
    assert caught.value.field == field
    assert "bad" not in [item.name for item in (await service.ScanCollections(scan_collections())).collections]


async def test_a_commit_without_passages_is_refused(service: RetrieverService) -> None:
    request = pb.CommitDocumentRequest(context=context(), document_id="empty.md", version="v1")
    with pytest.raises(InvalidRequestError, match="passages"):
        await service.CommitDocument(request)


def scan_collections(tenant: str = "public") -> pb.ScanCollectionsRequest:
    return pb.ScanCollectionsRequest(context=context(tenant))


async def test_scans(service: RetrieverService) -> None:
    page = await service.ScanDocuments(pb.ScanDocumentsRequest(context=context(), limit=2))
    rest = await service.ScanDocuments(pb.ScanDocumentsRequest(context=context(), after_document_id="peru.md"))
    some = await service.ScanDocuments(pb.ScanDocumentsRequest(context=context(), document_ids=["peru.md", "none"]))
    listed = await service.ScanPassages(
        pb.ScanPassagesRequest(context=context(), document_ids=["peru.md", "norway.md"])
    )

    assert [item.document_id for item in page.documents] == ["norway.md", "peru.md"]
    assert page.total_documents == 3
    assert page.documents[0].metadata["year"] == 1905
    assert [item.document_id for item in rest.documents] == ["tuvalu.md"]
    assert [item.document_id for item in some.documents] == ["peru.md"]
    assert [item.text for item in listed.passages] == TEXTS["norway.md"] + TEXTS["peru.md"]
    assert not any(item.HasField("metadata") and item.metadata.fields for item in listed.passages)
    with pytest.raises(InvalidRequestError, match="document_ids"):
        await service.ScanPassages(pb.ScanPassagesRequest(context=context()))


async def test_what_broken_off_uploads_left_is_swept_while_it_runs(
    service: RetrieverService, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough, times = asyncio.Event(), 0

    async def sweep() -> None:
        nonlocal times
        times += 1
        if times == 2:
            raise RuntimeError("once")
        if times == 4:
            enough.set()

    monkeypatch.setattr(rpcs, "SWEEP_PERIOD_S", 0.001)
    monkeypatch.setattr(service._index, "sweep", sweep)
    await service.start()
    await asyncio.wait_for(enough.wait(), 5)
    assert service._sweeping is not None
    service._sweeping.cancel()


async def test_removing(service: RetrieverService) -> None:
    for document_id in ("norway.md", "peru.md"):
        await ingest(service, document_id, "short-lived", "acme")
    request = pb.RemoveDocumentRequest(context=context("acme"), collection="short-lived", document_id="peru.md")

    assert (await service.RemoveDocument(request)).passages == 2
    with pytest.raises(NotFoundError, match=r"peru\.md"):
        await service.RemoveDocument(request)
    (summary,) = (await service.ScanCollections(scan_collections("acme"))).collections
    assert (summary.name, summary.documents, summary.passages) == ("short-lived", 1, 2)
    removed = await service.RemoveCollection(
        pb.RemoveCollectionRequest(context=context("acme"), collection="short-lived")
    )
    assert (removed.documents, removed.passages) == (1, 2)
    assert not (await service.ScanCollections(scan_collections("acme"))).collections
    with pytest.raises(InvalidRequestError, match="collection"):
        await service.RemoveCollection(pb.RemoveCollectionRequest(context=context()))


async def test_status(service: RetrieverService) -> None:
    status = await service.GetRetrieverStatus(pb.GetRetrieverStatusRequest())

    assert (status.backend, status.embedding_model, status.dimensions) == ("edge", "all-MiniLM-L6-v2", 384)
    assert (status.collections, status.passages) == (1, 5)
    (row,) = status.tenants
    assert (row.tenant, row.collections, row.documents, row.passages) == ("public", 1, 3, 5)
    assert row.bytes > 5 * 384 * 4


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (RetrieverSettings(replicas=2), "retriever.replicas"),
        (RetrieverSettings(backend="server"), "retriever.url"),
        (RetrieverSettings(embedding_model="/nowhere"), "retriever.embedding_model"),
    ],
)
def test_settings_that_cannot_work(settings: RetrieverSettings, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        check_settings(Settings(retriever=settings))


async def test_the_settings_choose_the_index() -> None:
    server = RetrieverSettings(backend="server", url="http://127.0.0.1:6333", api_key="key")

    assert isinstance(open_index(Settings(), EMBEDDING), EdgeIndex)
    index = open_index(Settings(retriever=server), EMBEDDING)
    assert isinstance(index, ServerIndex)
    await index.close()
