"""A disk nearly full: documents are refused first, then every change; what is stored is found all the while."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.errors import OverloadedError, UnavailableError
from blockrag.retriever import catalogue as edge_folder
from blockrag.retriever.edge_store import EdgeStore
from blockrag.retriever.vector_index import Counts
from tests.unit.retriever.passages import EMBEDDING, HOME, document, embedded, query

_MORE_THAN_ANY_DISK_MIB = 2**40


@pytest.fixture
def store(tmp_path: Path) -> EdgeStore:
    opened = EdgeStore(tmp_path, EMBEDDING, 1.0)
    opened.stage(HOME, [embedded("a", "v1", 0)])
    opened.commit(HOME, document("a", "v1", 1))
    opened.stage(HOME, [embedded("b", "v1", 0)])
    return opened


def test_documents_are_refused_and_those_under_way_may_be_finished(
    store: EdgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_folder, "DOCUMENTS_MIB", _MORE_THAN_ANY_DISK_MIB)
    with pytest.raises(OverloadedError, match="disk has"):
        store.stage(HOME, [embedded("c", "v1", 0)])
    store.commit(HOME, document("b", "v1", 1))
    assert store.remove_document(HOME, "a") == 1
    assert store.counts(HOME) == Counts(1, 1)
    store.close()


def test_nothing_is_changed_half_way(store: EdgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(edge_folder, "CHANGES_MIB", _MORE_THAN_ANY_DISK_MIB)
        with pytest.raises(UnavailableError, match="opened and changed"):
            store.commit(HOME, document("b", "v1", 1))
        with pytest.raises(UnavailableError, match="opened and changed"):
            store.remove_document(HOME, "a")
        assert [found.passage.document_id for found in store.search(HOME, query())] == ["a"]
        assert store.counts(HOME) == Counts(1, 1)
    store.commit(HOME, document("b", "v1", 1))
    assert store.counts(HOME) == Counts(2, 2)
    store.close()


def test_it_is_not_opened_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(edge_folder, "CHANGES_MIB", _MORE_THAN_ANY_DISK_MIB)
        with pytest.raises(UnavailableError, match="MiB free"):
            EdgeStore(tmp_path, EMBEDDING, 1.0)
    EdgeStore(tmp_path, EMBEDDING, 1.0).close()
