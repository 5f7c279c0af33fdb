"""Fields of equal names, from messages to dataclasses and back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from blockrag.alike import alike
from blockrag.v1.common_pb2 import PassageHolder
from blockrag.v1.corpus_pb2 import CollectionSummary, DeleteCollectionResponse


@dataclass(frozen=True)
class Collection:
    name: str
    passages: int
    pages: int = 0
    kept: str = "default"


def test_what_both_have_is_copied_and_the_rest_is_said_or_has_a_default() -> None:
    summary = CollectionSummary(name="work", documents=3, passages=40, language="english")

    assert alike(Collection, summary, pages=7) == Collection("work", 40, 7)
    assert alike(CollectionSummary, Collection("work", 40)) == CollectionSummary(name="work", passages=40)
    assert alike(DeleteCollectionResponse, summary, purged_blocks=9) == DeleteCollectionResponse(
        documents=3, passages=40, purged_blocks=9
    )


def test_what_is_said_goes_before_what_is_copied() -> None:
    assert alike(Collection, CollectionSummary(name="work", passages=1), passages=2).passages == 2


def test_a_dataclass_that_would_lack_a_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="name"):
        alike(Collection, PassageHolder(passage_id="p"), passages=1)
