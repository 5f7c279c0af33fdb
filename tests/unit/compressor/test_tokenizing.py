"""What is remembered of passages is bounded by their tokens: given ones may be a hundred times as long as others."""

from __future__ import annotations

import pytest

from blockrag.compressor.tokenizing import USUAL_TOKENS, PassageDrafts, PassageTokenizer
from blockrag.decoder.detokenizer import detokenizer_factory
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer

LONG = tuple(range(3, 3 + USUAL_TOKENS)) * 3


def test_few_long_passages_are_remembered_and_many_short_ones() -> None:
    passages = PassageTokenizer(make_tiny_tokenizer(), TEST_TEMPLATE, remembered=4)
    for number in range(6):
        passages.passage_ids(f"{number}", "short")
    assert [passages.remembers(f"{number}", "short") for number in range(6)] == [False] * 2 + [True] * 4
    for number in range(3):
        passages.remember(f"{number}", "long", LONG)
    assert [passages.remembers(f"{number}", "long") for number in range(3)] == [False, False, True]


@pytest.mark.parametrize("kind", ["plain", "worded", "sentences"])
def test_drafts_of_long_passages_are_few(kind: str) -> None:
    drafts = PassageDrafts(detokenizer_factory(make_tiny_tokenizer(), ""), 16, remembered=4)
    further = ("text",) if kind == "sentences" else ()

    def draft(first: int) -> object:
        return getattr(drafts, kind)((first, *LONG), *further)

    kept = draft(3)
    assert draft(3) is kept
    draft(4)
    assert draft(3) is not kept
