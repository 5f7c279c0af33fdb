from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.detokenizer import StopScanner


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: cut before the stop that is completed first, the longest of those completed together."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


_LETTERS = st.sampled_from("abcä")


@given(
    pieces=st.lists(st.text(_LETTERS, max_size=4), max_size=12),
    stops=st.lists(st.text(_LETTERS, min_size=1, max_size=5), max_size=3),
)
def test_pieces_add_up_to_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        shown += scanner.feed(piece)
        # What is shown is final: it never runs into a stop string that later text completes.
        assert "".join(pieces).startswith(shown)
        if scanner.stopped:
            break
    stopped = scanner.stopped
    shown += scanner.flush()
    assert (shown, stopped) == _cut("".join(pieces), stops)


@given(pieces=st.lists(st.text(_LETTERS, max_size=4), max_size=12), stop=st.text(_LETTERS, min_size=1, max_size=5))
def test_no_more_is_held_back_than_may_begin_a_stop(pieces: list[str], stop: str) -> None:
    scanner = StopScanner([stop])
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += scanner.feed(piece)
        if scanner.stopped:
            return
        held = text.removeprefix(shown)
        assert len(held) < len(stop)
        assert stop.startswith(held)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["Paris", ".", " It"], ["."], "Paris"),
        (["one END", "ING two"], ["ENDING"], "one "),
        (["a", "b", "c", "d"], ["abcd", "c"], "ab"),
        (["xab"], ["b", "ab"], "x"),
        (["stop"], ["stop"], ""),
        (["half a st"], ["stop"], "half a st"),
    ],
)
def test_examples(pieces: list[str], stops: list[str], shown: str) -> None:
    scanner = StopScanner(stops)
    assert "".join(map(scanner.feed, pieces)) + scanner.flush() == shown


def test_nothing_is_shown_after_a_stop() -> None:
    scanner = StopScanner(["."])
    assert scanner.feed("a.b") == "a"
    assert scanner.feed("c") == ""
    assert scanner.flush() == ""
