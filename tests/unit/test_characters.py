"""One reading of equal text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.characters import clean_line, clean_text, is_blank, normalise, normalise_values


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("in\u00adsur\u00adance", "insurance"),
        ("green\u200bhouses", "greenhouses"),
        ("\ufeffstart", "start"),
        ("wo\u2060rd", "word"),
        ("Pru\u0308fung", "Prüfung"),
        ("u\u00ad\u0308", "ü"),
        ("\u0915\u094d\u200d\u0937 \u0646\u200c\u0645", "\u0915\u094d\u200d\u0937 \u0646\u200c\u0645"),
        ("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f469\u200d\U0001f467"),
    ],
)
def test_what_cannot_be_seen_does_not_count(text: str, right: str) -> None:
    """Rows C3 and C4: soft hyphens and zero-width spaces between letters; NFC; joiners stay."""
    assert normalise(text) == right
    assert clean_text(text) == right


def test_a_word_that_a_soft_hyphen_breaks_at_a_lines_end_is_joined() -> None:
    """Row C5: U+00AD, in any format."""
    assert clean_text("the in\u00ad\n  surance\nand in\u00ad\r\nterest") == "the insurance\nand interest"


def test_lines_and_controls_of_documents() -> None:
    assert clean_text("a\r\nb\rc\x00\x07\td\x0ce\u2028f\u2029g\ud800\ufffe") == "a\nb\nc\td\n\ne\nf\n\ng"


@given(st.text())
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_text(text)

    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize(
    "text",
    ["", " \n\t", "\u200b\u200d\u200c\u2060", "\u00ad\ufeff \x00", "\u3164\u2800\u200e", "\ufe0f\U000e0100\u180b"],
)
def test_nothing_to_see_is_blank(text: str) -> None:
    """Section D: a text of zero-width characters only is empty."""
    assert is_blank(text)
    assert clean_line(text) == ""
    assert not is_blank(text + "x")


def test_values_are_normalised_with_their_names() -> None:
    assert normalise_values({"Gro\u0308ße": ["a\u00adb", 1, None, {"x\u200b": True}]}) == {
        "Größe": ["ab", 1, None, {"x": True}]
    }
    with pytest.raises(ValueError, match="two names"):
        normalise_values({"ä": 1, "a\u0308": 2})
