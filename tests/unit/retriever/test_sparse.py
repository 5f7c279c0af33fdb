"""BM25 weights."""

from __future__ import annotations

from blockrag.retriever.sparse import Bm25


def test_query_and_passage_share_stems_and_fold_accents() -> None:
    bm25 = Bm25()
    passage = bm25.embed_passage("Reykjavík", "Ships were sailing to the harbour.")

    assert set(bm25.embed_query("reykjavik sail harbours").indices) <= set(passage.indices)
    assert not set(bm25.embed_query("desert").indices) & set(passage.indices)


def test_stop_words_weigh_nothing() -> None:
    assert Bm25().embed_query("what is the of").indices == ()


def test_a_repeated_word_weighs_more_but_less_than_twice() -> None:
    once, twice = (Bm25().embed_passage("", text).values for text in ("salt harbour ship", "salt salt harbour ship"))

    assert max(once) < max(twice) < 2 * max(once)
