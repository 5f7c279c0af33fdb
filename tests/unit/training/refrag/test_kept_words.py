from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from blockrag.training.refrag.kept_words import KINDS, Word, kept_words, words_of
from tests.models import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
TEXT = "The river Glomma is long. It begins near Aursund in 1,234 small streams, as everybody says. Norway's part is 5."


def told(text: str) -> list[tuple[str, str]]:
    ids = TOKENIZER.encode(text)
    return [(word.kind, TOKENIZER.decode(ids[word.start : word.end]).strip()) for word in words_of(ids, TOKENIZER)]


def test_names_numbers_and_long_words_are_found() -> None:
    assert told(TEXT) == [
        ("name", "Glomma"),
        ("name", "Aursund"),
        ("number", "1,234"),
        ("word", "streams"),
        ("word", "everybody"),
        ("number", "5"),
    ]


def test_a_letter_of_several_tokens_ends_no_word() -> None:
    assert told("It lies near Malmö or Tromsø") == [("name", "Malmö"), ("name", "Tromsø")]


def test_the_first_word_of_a_sentence_or_line_is_no_name() -> None:
    assert told("Rome fell.\nTroy too. (Carthage) as well: Athens") == []


@given(st.text(max_size=60))
def test_words_are_whole_tokens_and_follow_each_other(text: str) -> None:
    ids = TOKENIZER.encode(text)
    last = 0
    for word in words_of(ids, TOKENIZER):
        assert word.kind in KINDS
        assert last <= word.start < word.end <= len(ids)
        last = word.end
        assert TOKENIZER.decode(ids[word.start : word.end]).strip() in text


def test_a_word_is_asked_for_behind_its_chunks_words_with_the_chunk_and_without_it() -> None:
    ids, k = TOKENIZER.encode(TEXT), 20
    words = {word for word in words_of(ids, TOKENIZER) if word.start // k == (word.end - 1) // k}
    assert {word.kind for word in words} == set(KINDS)
    for kind in KINDS:
        [sample] = kept_words([ids], kind, TOKENIZER, (7,), (8, 9), k, Random(0))
        compressed, guessed = sample.views
        [branch] = compressed.branches
        assert guessed.branches == compressed.branches
        assert guessed.mask == () and [list(chunks) for chunks in compressed.mask] == [[False]]
        [place] = [at for at in range(0, len(ids), k) if ids[at : at + k] == list(sample.passages[0])]
        start = place + len(branch.prompt) - 2
        assert list(branch.prompt) == [8, 9, *ids[place:start]]
        assert Word(kind, start, start + len(branch.answer)) in words
        assert sample.instruction == (7,)


def test_a_passage_without_such_words_asks_for_none() -> None:
    assert kept_words([TOKENIZER.encode("is it so")], "number", TOKENIZER, (), (), 16, Random(0)) == []
