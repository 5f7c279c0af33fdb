"""Sentences of blocks: where they are, which come first, what fits."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.compressor.sentences import Sentence, chosen, order_of, read_spans, sentences_of
from blockrag.v1.common_pb2 import CHUNK_FORM_DROPPED, CHUNK_FORM_EXPANDED, ChunkDecision
from blockrag.v1.compressor_pb2 import PassagePlan

TEXT = "It is old. Is it 3.5 m high? Yes! Nobody knows why"


def split(text: str, title: str = "Tower: ", width: int = 3) -> tuple[Sentence, ...]:
    whole = title + text
    return sentences_of([whole[start : start + width] for start in range(0, len(whole), width)], text)


def test_sentences_and_what_stands_before_them() -> None:
    found = split(TEXT, width=1)
    assert [sentence.text for sentence in found] == [
        "Tower: ",
        "It is old. ",
        "Is it 3.5 m high? ",
        "Yes! ",
        "Nobody knows why",
    ]
    assert [(sentence.start, sentence.end) for sentence in found[:2]] == [(0, 7), (7, 18)]


def test_lines_and_other_scripts_end_sentences_too() -> None:
    assert [sentence.text for sentence in split("## Land\n\nFlat.\nWet", "", 1)][1:] == [
        "## Land\n\n",
        "Flat.\n",
        "Wet",
    ]
    assert [sentence.text for sentence in split("東京は首都です。人口は多い。", "", 1)][1:] == [
        "東京は首都です。",
        "人口は多い。",
    ]
    assert [sentence.text for sentence in split("He said “Go.” Then he went.", "", 1)][1:] == [
        "He said “Go.” ",
        "Then he went.",
    ]


@given(
    text=st.text(alphabet='ab .!?\n。"', min_size=1, max_size=80),
    title=st.text(alphabet="xyz: ", max_size=10),
    width=st.integers(1, 5),
)
def test_every_token_is_in_one_sentence(text: str, title: str, width: int) -> None:
    found = split(text, title, width)
    assert found[0].start == 0
    assert all(earlier.end == later.start for earlier, later in itertools.pairwise(found))
    assert found[-1].end == -(-len(title + text) // width)
    assert "".join(sentence.text for sentence in found) == title + text
    assert all(sentence.slots for sentence in found[1:])


@pytest.mark.parametrize(
    "text", ["\n" * 100_000 + " ", ". " * 50_000, "." + " " * 100_000, "!)" * 50_000, "x" * 100_000]
)
def test_no_text_takes_long(text: str) -> None:
    began = time.monotonic()
    found = sentences_of([text[start : start + 50] for start in range(0, len(text), 50)], text)
    assert found[-1].end == len(text) // 50 + (len(text) % 50 > 0)
    assert time.monotonic() - began < 2


def test_text_that_is_not_found_has_no_head() -> None:
    found = sentences_of(["One. ", "Two."], "Something else")
    assert [sentence.text for sentence in found] == ["", "One. ", "Two."]


BRIDGE = split("The bridge is long. Clara Voss designed the bridge. It is grey.", "Arle Bridge: ", 1)
TOWN = split("The town is small. Its mayor is Clara. Nobody designed it.", "Arle: ", 1)


def test_words_of_the_question_come_first_and_then_the_better_passage() -> None:
    order = order_of("Who designed the bridge?", [BRIDGE, TOWN], ["Arle Bridge", "Arle"])
    assert order[0] == (0, 2)
    assert sorted(order) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    # of sentences that share nothing with it, those of the better passage
    nothing = order_of("zzz", [BRIDGE, TOWN], ["", ""])
    assert nothing == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert order_of("Who?", [], []) == []


def test_what_fits_is_taken_with_its_head() -> None:
    order = [(0, 2), (1, 2), (0, 1), (0, 3), (1, 1), (1, 3)]
    best = BRIDGE[0].slots + BRIDGE[2].slots
    assert chosen(order, [BRIDGE, TOWN], best, 0) == [{0, 2}, set()]
    assert chosen(order, [BRIDGE, TOWN], best + BRIDGE[1].slots, 0) == [{0, 1, 2}, set()]  # TOWN's head is too much
    assert chosen(order, [BRIDGE, TOWN], 10_000, 10_000) == [{0, 1, 2, 3}, {0, 1, 2, 3}]
    assert chosen([], [BRIDGE], 100, 100) == [set()]


def test_a_budget_below_every_sentence_takes_the_best_that_may_be() -> None:
    order = [(0, 2), (0, 3)]
    assert chosen(order, [BRIDGE, TOWN], 1, 1000) == [{0, 2}, set()]
    assert chosen(order, [BRIDGE, TOWN], 1, BRIDGE[0].slots + BRIDGE[3].slots) == [{0, 3}, set()]
    assert chosen(order, [BRIDGE, TOWN], 1, 1) == [set(), set()]


@given(
    slots=st.integers(0, 200),
    most=st.integers(0, 200),
    order=st.permutations([(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]),
)
def test_never_more_than_there_is_room_for(slots: int, most: int, order: list[tuple[int, int]]) -> None:
    passages = [BRIDGE, TOWN]
    taken = chosen(order, passages, slots, most)
    used = sum(passages[place][number].slots for place, kept in enumerate(taken) for number in kept)
    assert used <= max(slots, most)
    assert used <= slots or sum(len(kept) for kept in taken) == 2  # a sentence and its head
    assert all(0 in kept for kept in taken if kept)


def test_neighbours_are_one_span() -> None:
    forms = (CHUNK_FORM_EXPANDED, CHUNK_FORM_EXPANDED, CHUNK_FORM_DROPPED, CHUNK_FORM_EXPANDED)
    chunks = [
        ChunkDecision(start_token=4 * place, end_token=4 * place + 4, form=form) for place, form in enumerate(forms)
    ]
    assert read_spans(PassagePlan(chunks=chunks)) == [(0, 8), (12, 16)]
    assert read_spans(PassagePlan()) == []
