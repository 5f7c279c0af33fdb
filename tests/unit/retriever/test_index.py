"""The contract of a VectorIndex, run against both engines.

The Qdrant client's in-memory mode stands in for a server: it has the server's API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient

from blockrag.bm25 import SparseVector
from blockrag.errors import InvalidRequestError, NotFoundError
from blockrag.identity import CollectionId
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.payload import AnyTerm, Condition, NumberRange, metadata_terms, number_field
from blockrag.retriever.server import ServerIndex
from blockrag.retriever.vector_index import Counts, EmbeddedPassage, SearchQuery, VectorIndex
from tests.unit.retriever.passages import DIMENSIONS, EMBEDDING, HOME, document, embedded, query

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")


@pytest.fixture(scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VectorIndex]:
    """One worker process for all tests here."""
    made = EdgeIndex(tmp_path_factory.mktemp("index"), EMBEDDING)
    yield made
    await made.close()


@pytest.fixture(params=["edge", "server"])
async def index(request: pytest.FixtureRequest, edge: VectorIndex) -> AsyncIterator[VectorIndex]:
    """An empty index."""
    if request.param == "edge":
        yield edge
        for collection in await edge.collections(None):
            await edge.remove_collection(collection)
    else:
        made = ServerIndex(AsyncQdrantClient(":memory:"), EMBEDDING, "memory")
        yield made
        await made.close()


async def ingest(index: VectorIndex, document_id: str, version: str, count: int, **options: Any) -> str:
    collection = options.get("collection", HOME)
    await index.stage(collection, [embedded(document_id, version, number, **options) for number in range(count)])
    return await index.commit(collection, document(document_id, version, count, options.get("metadata")))


async def found(index: VectorIndex, search: SearchQuery | None = None, collection: CollectionId = HOME) -> set[str]:
    return {item.passage.text for item in await index.search(collection, search or query())}


async def test_staged_passages_are_invisible_until_their_document_is_committed(index: VectorIndex) -> None:
    await index.stage(HOME, [embedded("a", "v1", 0), embedded("a", "v1", 1)])

    assert await found(index) == set()
    assert await index.documents(HOME, "", 10) == []
    assert await index.passages(HOME, ["a"]) == []
    assert await index.counts(HOME) == Counts(0, 0)

    assert await index.commit(HOME, document("a", "v1", 2)) == ""
    assert await found(index) == {"a v1 passage 0", "a v1 passage 1"}
    assert await index.documents(HOME, "", 10) == [document("a", "v1", 2)]
    assert await index.counts(HOME) == Counts(1, 2)


async def test_a_collection_takes_room_on_a_disk(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 2)
    small = await index.disk_bytes(HOME)
    await ingest(index, "b", "v1", 200)
    assert 0 < small < await index.disk_bytes(HOME)
    await index.remove_collection(HOME)
    with pytest.raises(NotFoundError):
        await index.disk_bytes(HOME)


async def test_a_passage_comes_back_as_it_was(index: VectorIndex) -> None:
    metadata = {
        "lang": "en",
        "year": 1999,
        "ratio": 0.5,
        "tags": ["a", "b"],
        "deep": {"x": [1, None, True]},
        "no": None,
    }
    sent = embedded("dir/a.txt", "v1", 0, text="Zürich 🏔\n\nsecond", metadata=metadata)
    await index.stage(HOME, [sent])
    await index.commit(HOME, document("dir/a.txt", "v1", 1, metadata, title="Ä title"))

    assert await index.passages(HOME, ["dir/a.txt"]) == [sent.passage]
    assert [item.passage for item in await index.search(HOME, query())] == [sent.passage]
    assert await index.find_documents(HOME, ["dir/a.txt"]) == [document("dir/a.txt", "v1", 1, metadata, "Ä title")]


async def test_staging_and_committing_again_changes_nothing(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 3)
    assert await ingest(index, "a", "v1", 3) == ""

    assert await index.counts(HOME) == Counts(1, 3)
    assert len(await index.search(HOME, query())) == 3


async def test_a_new_version_replaces_the_old_one(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 3)
    await ingest(index, "b", "v1", 1)
    await index.stage(HOME, [embedded("a", "v2", 0), embedded("a", "v2", 1)])
    assert await found(index) == {f"a v1 passage {number}" for number in range(3)} | {"b v1 passage 0"}

    assert await index.commit(HOME, document("a", "v2", 2)) == "v1"
    assert await found(index) == {"a v2 passage 0", "a v2 passage 1", "b v1 passage 0"}
    assert [passage.version for passage in await index.passages(HOME, ["a"])] == ["v2", "v2"]
    assert await index.counts(HOME) == Counts(2, 3)


async def test_an_old_version_can_come_back(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 2)
    await ingest(index, "a", "v2", 1)

    assert await ingest(index, "a", "v1", 2) == "v2"
    assert await found(index) == {"a v1 passage 0", "a v1 passage 1"}


async def test_committing_too_few_passages_is_an_error_and_changes_nothing(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 2)
    await index.stage(HOME, [embedded("a", "v2", 0), embedded("a", "v2", 2)])

    with pytest.raises(InvalidRequestError, match="only 2 of 3") as caught:
        await index.commit(HOME, document("a", "v2", 3))
    assert caught.value.field == "passages"
    assert await found(index) == {"a v1 passage 0", "a v1 passage 1"}
    with pytest.raises(InvalidRequestError, match="only 0 of 1"):
        await index.commit(CollectionId("public", "unknown"), document("a", "v1", 1))


async def test_what_an_interrupted_run_staged_is_completed_by_the_next(index: VectorIndex) -> None:
    await index.stage(HOME, [embedded("a", "v1", 0), embedded("a", "v1", 1)])
    await ingest(index, "a", "v1", 4)

    assert [passage.ordinal for passage in await index.passages(HOME, ["a"])] == [0, 1, 2, 3]
    assert await index.counts(HOME) == Counts(1, 4)


async def test_passages_staged_beyond_the_committed_number_never_show(index: VectorIndex) -> None:
    await index.stage(HOME, [embedded("a", "v1", number) for number in range(4)])
    await index.commit(HOME, document("a", "v1", 2))

    assert await found(index) == {"a v1 passage 0", "a v1 passage 1"}
    assert len(await index.passages(HOME, ["a"])) == 2


async def test_another_version_that_is_being_staged_survives_a_commit(index: VectorIndex) -> None:
    await index.stage(HOME, [embedded("a", "v2", 0)])
    await ingest(index, "a", "v1", 1)
    await index.stage(HOME, [embedded("a", "v2", 1)])

    assert await index.commit(HOME, document("a", "v2", 2)) == "v1"
    assert await found(index) == {"a v2 passage 0", "a v2 passage 1"}


async def test_removing_a_document(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 2)
    await ingest(index, "b", "v1", 1)

    assert await index.remove_document(HOME, "a") == 2
    assert await found(index) == {"b v1 passage 0"}
    assert await index.find_documents(HOME, ["a"]) == []
    with pytest.raises(NotFoundError, match="'a'"):
        await index.remove_document(HOME, "a")


async def test_tenants_and_collections_are_apart(index: VectorIndex) -> None:
    other_tenant, other_name = CollectionId("acme", "default"), CollectionId("public", "Other.name")
    for collection in (HOME, other_tenant, other_name):
        await ingest(index, "a", "v1", 1, text=f"of {collection.tenant} {collection.name}", collection=collection)

    assert await found(index) == {"of public default"}
    assert await found(index, collection=other_tenant) == {"of acme default"}
    assert await index.collections("public") == [other_name, HOME]
    assert await index.collections(None) == [other_tenant, other_name, HOME]
    assert await index.collections("nobody") == []

    assert await index.remove_collection(HOME) == Counts(1, 1)
    assert await index.collections(None) == [other_tenant, other_name]
    assert await found(index, collection=other_name) == {"of public Other.name"}


async def test_a_removed_collection_can_be_made_again(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 2)
    await index.remove_collection(HOME)
    await ingest(index, "b", "v1", 1)

    assert await found(index) == {"b v1 passage 0"}


async def test_unknown_collections(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 1)
    unknown = CollectionId("public", "unknown")
    calls = [
        index.search(unknown, query()),
        index.documents(unknown, "", 10),
        index.find_documents(unknown, ["a"]),
        index.passages(unknown, ["a"]),
        index.counts(unknown),
        index.remove_document(unknown, "a"),
        index.remove_collection(unknown),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match="'unknown'"):
            await call


async def test_documents_are_paged_by_id(index: VectorIndex) -> None:
    ids = ["b", "a/2", "ä", "A", "a/10", "z", "日本"]
    for document_id in ids:
        await ingest(index, document_id, "v1", 1)

    pages: list[list[str]] = []
    after = ""
    while page := [item.document_id for item in await index.documents(HOME, after, 3)]:
        pages.append(page)
        after = page[-1]
    assert [item for page in pages for item in page] == sorted(ids)
    assert [len(page) for page in pages] == [3, 3, 1]
    found_ids = [item.document_id for item in await index.find_documents(HOME, ["z", "none", "A", "z"])]
    assert found_ids == ["A", "z"]


async def test_passages_are_ordered_by_document_and_place(index: VectorIndex) -> None:
    for document_id in ("b", "a"):
        passages = [embedded(document_id, "v1", number) for number in range(12)]
        await index.stage(HOME, passages[6:])
        await index.stage(HOME, passages[:6])
        await index.commit(HOME, document(document_id, "v1", 12))

    listed = [(item.document_id, item.ordinal) for item in await index.passages(HOME, ["b", "a", "none"])]
    assert listed == [(document_id, number) for document_id in "ab" for number in range(12)]


async def test_dense_and_bm25_are_fused(index: VectorIndex) -> None:
    await index.stage(
        HOME,
        [
            embedded("a", "v1", 0, text="both", near=2, terms=[7]),
            embedded("a", "v1", 1, text="dense only", near=2, terms=[1]),
            embedded("a", "v1", 2, text="words only", near=5, terms=[7, 8]),
            embedded("a", "v1", 3, text="neither", near=5, terms=[1]),
        ],
    )
    await index.commit(HOME, document("a", "v1", 4))
    best = await index.search(HOME, query(near=2, terms=[7], limit=2, candidates=2))

    assert best[0].passage.text == "both"
    # First in the dense ranking; within the two best by words.
    assert best[0].score in (1 / 61 + 1 / 61, 1 / 61 + 1 / 62)
    assert len(best) == 2
    assert best[0].score > best[1].score


async def test_without_words_only_the_dense_search_counts(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 3)
    best = await index.search(HOME, query(terms=[], limit=2))

    assert [item.passage.ordinal for item in best] == [0, 1]
    assert [item.score for item in best] == [1 / 61, 1 / 62]


async def test_without_a_vector_only_bm25_counts(index: VectorIndex) -> None:
    await index.stage(
        HOME, [embedded("near", "v1", 0, near=0, terms=[2]), embedded("near", "v1", 1, near=1, terms=[1])]
    )
    await index.commit(HOME, document("near", "v1", 2))
    found = await index.search(HOME, replace(query(near=0, terms=[1]), dense=None))
    assert [item.passage.ordinal for item in found] == [1]


async def test_limits(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 9)

    assert len(await index.search(HOME, query(limit=4))) == 4
    assert len(await index.search(HOME, query(limit=500, candidates=500))) == 9


async def test_equal_passages_fill_one_place(index: VectorIndex) -> None:
    """Row "six equal passages fill five places": one result, which names all documents that hold it."""
    for number in range(60):
        copy = embedded(f"copy {number:02}", "v1", 0, text="All rights reserved.", metadata={"even": number % 2 == 0})
        await index.stage(HOME, [copy])
        await index.commit(HOME, document(f"copy {number:02}", "v1", 1))
    await index.stage(HOME, [embedded("b", "v1", number, text=f"other {number}", near=1) for number in range(4)])
    await index.commit(HOME, document("b", "v1", 4))

    best = await index.search(HOME, query(limit=5, candidates=5))
    texts = [item.passage.text for item in best]
    assert texts[0] == "All rights reserved."
    assert sorted(texts[1:]) == [f"other {number}" for number in range(4)]
    names = [best[0].passage.document_id, *(holder.document_id for holder in best[0].also_in)]
    assert sorted(names) == [f"copy {number:02}" for number in range(60)]
    assert best[0].also_in[0].title == f"Title of {best[0].also_in[0].document_id}"
    assert not any(item.also_in for item in best[1:])
    (even,) = await index.search(HOME, query(any_of("even", True), limit=5))
    assert len(even.also_in) == 29
    await index.remove_document(HOME, "copy 07")
    best = await index.search(HOME, query(limit=5, candidates=5))
    assert len(best[0].also_in) == 58


async def test_a_collection_keeps_its_language(index: VectorIndex) -> None:
    """Row C1: the language is stored with the collection, another is refused."""
    await index.stage(HOME, [embedded("a", "v1", 0)], "russian")
    await index.commit(HOME, document("a", "v1", 1))

    assert await index.language(HOME) == "russian"
    with pytest.raises(InvalidRequestError, match="has the language russian, not english") as refused:
        await index.stage(HOME, [embedded("b", "v1", 0)], "english")
    assert refused.value.field == "language"
    with pytest.raises(NotFoundError):
        await index.language(CollectionId("public", "unknown"))


async def test_a_document_knows_its_source(index: VectorIndex) -> None:
    """Row C13."""
    await index.stage(HOME, [embedded("r1", "v1", 0)])
    await index.commit(HOME, replace(document("r1", "v1", 1), source="rows.jsonl"))

    assert [item.source for item in await index.documents(HOME, "", 10)] == ["rows.jsonl"]


async def test_a_version_that_was_replaced_while_it_was_staged_again_is_committed(index: VectorIndex) -> None:
    """Row A1: A stages a version that is current, B replaces it, A commits."""
    await ingest(index, "a", "v1", 2)
    await index.stage(HOME, [embedded("a", "v1", number) for number in range(2)])
    await ingest(index, "a", "v2", 1)

    assert await index.commit(HOME, document("a", "v1", 2)) == "v2"
    assert await found(index) == {"a v1 passage 0", "a v1 passage 1"}
    assert await index.counts(HOME) == Counts(1, 2)


FILTERED: dict[str, dict[str, Any]] = {
    "a": {"lang": "en", "year": 1990, "draft": False, "tags": ["x", "y"]},
    "b": {"lang": "de", "year": 2000.5, "draft": True},
    "c": {"lang": "en", "year": "2000", 'odd "key".[0]': "v", "deep": {"lang": "fr"}},
    "d": {},
    "e": {"years": [1980, 2010], "author": {"name": "Ann", "born": 1950}, "zip": "01234", "city": "Paris, France"},
}


def any_of(key: str, *values: Any, negated: bool = False) -> Condition:
    return AnyTerm(tuple(metadata_terms({key: list(values)})), negated)


FILTERS: list[tuple[list[Condition], str]] = [
    ([any_of("lang", "en")], "ac"),
    ([any_of("lang", "en", "de")], "abc"),
    ([any_of("lang", "en", negated=True)], "bde"),
    ([any_of("lang", "en", "de", negated=True)], "de"),
    ([any_of("draft", True)], "b"),
    ([any_of("draft", False)], "a"),
    ([any_of("draft", True, negated=True)], "acde"),
    ([any_of("year", 1990)], "a"),
    ([any_of("year", "2000", 2000.5)], "bc"),
    ([any_of("tags", "y")], "a"),
    ([any_of('odd "key".[0]', "v")], "c"),
    ([any_of("lang", "fr")], ""),
    ([NumberRange(number_field("year"), at_least=1990)], "ab"),
    ([NumberRange(number_field("year"), at_most=2000)], "a"),
    ([NumberRange(number_field("year"), at_least=1991), NumberRange(number_field("year"), at_most=2001)], "b"),
    ([NumberRange(number_field("none"), at_least=0)], ""),
    ([any_of("lang", "en"), NumberRange(number_field("year"), at_most=2000)], "a"),
    ([any_of("years", 2010)], "e"),
    ([NumberRange(number_field("years"), at_least=1990)], "e"),
    ([NumberRange(number_field("years"), at_least=2011)], ""),
    ([any_of("author.name", "Ann")], "e"),
    ([NumberRange(number_field("author.born"), at_most=1950)], "e"),
    ([any_of("zip", "01234")], "e"),
    ([any_of("zip", 1234)], ""),
    ([any_of("city", "Paris, France")], "e"),
    ([], "abcde"),
]


async def test_filters(index: VectorIndex) -> None:
    """Row C10, for e."""
    for document_id, metadata in FILTERED.items():
        await ingest(index, document_id, "v1", 2, metadata=metadata)

    for conditions, expected in FILTERS:
        best = await index.search(HOME, query(*conditions))
        assert sorted({item.passage.document_id for item in best}) == list(expected), conditions


async def test_sweeping_removes_old_staged_passages_only(index: VectorIndex) -> None:
    await ingest(index, "a", "v1", 2)
    await index.stage(HOME, [embedded("b", "v1", 0)])

    await index.sweep(older_than_s=3600)
    assert await index.commit(HOME, document("b", "v1", 1)) == ""
    await index.stage(HOME, [embedded("c", "v1", 0)])
    await index.sweep(older_than_s=-1)
    with pytest.raises(InvalidRequestError, match="only 0 of 1"):
        await index.commit(HOME, document("c", "v1", 1))
    assert len(await found(index)) == 3


async def test_concurrent_ingests_and_searches(index: VectorIndex) -> None:
    await ingest(index, "doc0", "v0", 5)

    async def update(number: int) -> None:
        for version in range(3):
            await ingest(index, f"doc{number}", f"v{version}", 5)

    async def watch() -> None:
        for _ in range(30):
            versions: dict[str, set[str]] = {}
            for item in await index.search(HOME, query(limit=100, candidates=100)):
                versions.setdefault(item.passage.document_id, set()).add(item.passage.version)
            assert all(len(seen) == 1 for seen in versions.values()), versions
            await asyncio.sleep(0)

    await asyncio.gather(watch(), *(update(number) for number in range(6)))
    assert await index.counts(HOME) == Counts(6, 30)
    assert {(item.passage.version) for item in await index.search(HOME, query(limit=100))} == {"v2"}


async def test_many_passages(index: VectorIndex) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((1200, DIMENSIONS)).astype(np.float32)
    for start in range(0, 1200, 200):
        passages = [embedded("big", "v1", number) for number in range(start, start + 200)]
        await index.stage(
            HOME, [EmbeddedPassage(item.passage, vectors[item.passage.ordinal], item.sparse) for item in passages]
        )
    await index.commit(HOME, document("big", "v1", 1200))

    assert len(await index.passages(HOME, ["big"])) == 1200
    wanted = SearchQuery(vectors[777], SparseVector((), ()), 1, 50, 60)
    assert [item.passage.ordinal for item in await index.search(HOME, wanted)] == [777]
