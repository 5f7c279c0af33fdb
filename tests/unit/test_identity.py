"""Names and ids."""

from __future__ import annotations

import base64
import uuid

import pytest

from blockrag.errors import InvalidRequestError
from blockrag.identity import CollectionId, check_document_id, page_token_after, passage_id, read_page_token


@pytest.mark.parametrize("name", ["a", "Default", "my-notes_2.1", "0", "a" * 64])
def test_names_a_collection_may_have(name: str) -> None:
    assert CollectionId("public", name).name == name


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a b", "a/b", "ä", "a" * 65, "a\n", "../up"])
def test_names_a_collection_may_not_have(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        CollectionId("public", name)
    assert caught.value.field == "collection"


@pytest.mark.parametrize("tenant", ["", "Public", "a.b", "a/b", "x" * 64])
def test_tenants_that_cannot_be(tenant: str) -> None:
    with pytest.raises(InvalidRequestError, match="tenant"):
        CollectionId(tenant, "default")


@pytest.mark.parametrize("document_id", ["", "   ", "a\x00b", "a\nb", "x" * 513, "\ud800"])
def test_ids_a_document_may_not_have(document_id: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_document_id(document_id)
    assert caught.value.field == "document_id"


def test_passage_ids_are_uuids_made_of_all_their_parts() -> None:
    base = (CollectionId("t", "c"), "d", "v", 0)
    others = [
        (CollectionId("u", "c"), "d", "v", 0),
        (CollectionId("t", "e"), "d", "v", 0),
        (CollectionId("t", "c"), "e", "v", 0),
        (CollectionId("t", "c"), "d", "w", 0),
        (CollectionId("t", "c"), "d", "v", 1),
    ]

    assert uuid.UUID(passage_id(*base)).version == 5
    assert passage_id(*base) == passage_id(*base)
    assert len({passage_id(*parts) for parts in [base, *others]}) == 6


@pytest.mark.parametrize("content", ["[" * 100_000, '["c", "\\ud800"]', '["c", ""]', '["c", 1]', "{}", '["d", "a"]'])
def test_page_tokens_that_are_none(content: str) -> None:
    assert read_page_token(page_token_after("c", "a"), "c") == "a"
    with pytest.raises(InvalidRequestError):
        read_page_token(base64.urlsafe_b64encode(content.encode()).decode(), "c")
