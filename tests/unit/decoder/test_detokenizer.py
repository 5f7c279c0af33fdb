from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blockrag.decoder.detokenizer import WindowDetokenizer, detokenizer_factory
from tests.models import make_tiny_tokenizer

_TOKENIZER = make_tiny_tokenizer()
_NEW = detokenizer_factory(_TOKENIZER, " ")


def _ids(text: str) -> list[int]:
    return list(_TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary in the style of Llama 2: words with a mark for the space, bytes for everything else."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁city", "▁", "a", "b"]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@given(st.text(max_size=40))
def test_a_text_comes_back_in_whole_characters(text: str) -> None:
    detokenizer = _NEW()
    pieces = [detokenizer.feed(token) for token in _ids(" " + text)]
    assert "".join(pieces) == text
    for piece in pieces:
        piece.encode()  # a lone surrogate would be half a character


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_give_what_decoding_them_together_gives(token_ids: list[int]) -> None:
    detokenizer = _NEW()
    text = "".join(map(detokenizer.feed, token_ids))
    whole = str(_TOKENIZER.decode(token_ids, skip_special_tokens=True)).removeprefix(" ")
    # Only a character that was left unfinished is missing.
    assert whole == text or whole.removeprefix(text) == "\ufffd"


def test_a_character_is_shown_with_its_last_byte() -> None:
    detokenizer = _NEW()
    assert [detokenizer.feed(token) for token in _ids(" ø€")] == ["", "", "ø", "", "", "€"]


def test_only_the_first_space_is_stripped() -> None:
    detokenizer = _NEW()
    assert "".join(map(detokenizer.feed, _ids("  the land"))) == " the land"


def test_an_answer_without_its_prefix_is_left_alone() -> None:
    detokenizer = _NEW()
    assert "".join(map(detokenizer.feed, _ids("the land"))) == "the land"


@pytest.mark.parametrize(("text", "shown"), [("==> yes", "yes"), ("= no", "= no"), ("==x", "==x")])
def test_a_longer_prefix_is_held_until_it_is_certain(text: str, shown: str) -> None:
    detokenizer = detokenizer_factory(_TOKENIZER, "==> ")()
    assert "".join(map(detokenizer.feed, _ids(text))) == shown


def test_special_tokens_give_no_text() -> None:
    detokenizer = _NEW()
    assert [detokenizer.feed(token) for token in (3, *_ids(" a"), 4)][-1] == ""
    assert detokenizer.feed(3) == ""


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["Ġø"])
    detokenizer = detokenizer_factory(tokenizer, "")()
    assert detokenizer.feed(tokenizer.convert_tokens_to_ids("Ġø")) == "Ġø"


def test_other_vocabularies_are_decoded_in_windows() -> None:
    tokenizer = _fallback_tokenizer()
    ids = tokenizer("the city aø€b the", add_special_tokens=False)["input_ids"]
    detokenizer = WindowDetokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in ids]
    assert "".join(pieces) == "the city aø€b the"
    assert not any("\ufffd" in piece for piece in pieces)
    assert isinstance(detokenizer_factory(tokenizer, "")().feed(ids[0]), str)
