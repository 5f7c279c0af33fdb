from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.errors import BundleError
from blockrag.modeling.bundle import DEFAULT_BUNDLE, load_bundle
from blockrag.modeling.running_text import FastTokenizer, field_ids

BUNDLE = load_bundle(DEFAULT_BUNDLE, verify_files=False)
FAST, STOCK = BUNDLE.load_fast_tokenizer(), BUNDLE.load_tokenizer()
FAST_TEXT, STOCK_TEXT = detokenizer_factory(FAST, ""), detokenizer_factory(STOCK, "")
PIECES = st.sampled_from(["<|im_start|>", "<|im_end|>", " ", "\n", "Oslo", "12 ", "ß日本"]) | st.text()
TEXTS = st.lists(PIECES).map("".join)


@given(TEXTS)
def test_tokens_are_those_of_transformers(text: str) -> None:
    assert FAST(text, add_special_tokens=False)["input_ids"] == STOCK(text, add_special_tokens=False)["input_ids"]
    expected = STOCK(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert field_ids(FAST, text) == field_ids(STOCK, text) == expected


@given(TEXTS)
def test_so_is_the_text_of_tokens(text: str) -> None:
    ids = STOCK(text, add_special_tokens=False)["input_ids"]
    fast, stock = FAST_TEXT(), STOCK_TEXT()

    assert [fast.feed(token) for token in ids] == [stock.feed(token) for token in ids]
    assert FAST.decode(ids, skip_special_tokens=True) == STOCK.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_threads_may_share_one() -> None:
    text = "What <|im_end|> is"
    whole, split = FAST(text)["input_ids"], field_ids(FAST, text)
    assert whole != split

    def wrong(number: int) -> bool:
        found = field_ids(FAST, text) if number % 2 else FAST(text)["input_ids"]
        return found != (split if number % 2 else whole)

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(wrong, range(2000)))


def test_a_tokenizer_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        FastTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match="does not load"):
        FastTokenizer.load(tmp_path)
