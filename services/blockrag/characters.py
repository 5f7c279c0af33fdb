"""One reading of what people type and what files hold, so that equal text is equal characters.

Text, titles, ids, metadata, filters and questions all go through here where they enter. Composed (NFC), without what
only tells a program where a word may be broken (U+00AD, U+200B), without byte order marks and word joiners. Joiners
that carry meaning (U+200C, U+200D) stay.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from blockrag.errors import InvalidRequestError

_DROPPED = "\u00ad\u200b\u2060\ufeff"
_INVISIBLE = re.compile(f"[{_DROPPED}]")
# Tabs and newlines stay; what separates lines or paragraphs becomes newlines; the rest of C0, DEL, C1, lone
# surrogates and the two noncharacters that pass for byte order marks go.
_CLEANED = dict.fromkeys(
    [*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF, *map(ord, _DROPPED)]
)
_CLEANED |= {9: "\t", 10: "\n", 11: "\n", 12: "\n\n", 0x85: "\n", 0x2028: "\n", 0x2029: "\n\n"}
_UNCLEAN = re.compile(
    f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff{_DROPPED}]",
)
_BROKEN_WORD = re.compile("\u00ad[ \t]*\n[ \t]*")
# Letters or marks by their category, and yet nothing to see: fillers, and what chooses a variant of the one before.
_BLANK_LETTERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(
    map(chr, [*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])
)
# Control characters but tab, line feed and carriage return; lone surrogates; U+FFFE and U+FFFF.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LINE_BREAKS = re.compile(r"[\t\n\r]")


def normalise(text: str) -> str:
    """NFC without invisible characters. Of a field: control characters are left for its check to refuse."""
    if text.isascii():
        return text
    if _INVISIBLE.search(text):
        text = _INVISIBLE.sub("", text)
    return unicodedata.normalize("NFC", text)


def clean_text(text: str) -> str:
    """The text of a document: normalised, without control characters, with ``\\n`` as newline.

    A word that a soft hyphen breaks at a line's end is joined.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _UNCLEAN.search(text):
        text = _BROKEN_WORD.sub("", text).translate(_CLEANED)
    return unicodedata.normalize("NFC", text)


def clean_line(text: str) -> str:
    """A title: cleaned, on one line; empty when nothing of it can be seen."""
    line = " ".join(clean_text(text).split())
    return "" if is_blank(line) else line


def is_blank(text: str) -> bool:
    """Nothing can be seen: spaces, controls, zero-width and other format characters only."""
    return all(
        character.isspace() or character in _BLANK_LETTERS or unicodedata.category(character) in ("Cf", "Cc")
        for character in text
    )


def normalise_values(value: Any) -> Any:
    """A JSON value with every text in it normalised, the names of fields too.

    Raises ``ValueError`` where two names of one object become the same.
    """
    if isinstance(value, str):
        return normalise(value)
    if isinstance(value, list):
        return [normalise_values(item) for item in value]
    if isinstance(value, dict):
        named = {
            normalise(name) if isinstance(name, str) else name: normalise_values(item) for name, item in value.items()
        }
        if len(named) < len(value):
            raise ValueError("two names differ only in how they are encoded")
        return named
    return value


def check_text(field: str, text: str) -> None:
    """Refuses control characters (but tab and line breaks) and what is no Unicode text."""
    found = _FORBIDDEN.search(text)
    if found is not None:
        raise InvalidRequestError(
            field, f"holds the control or invalid character U+{ord(found[0]):04X} at {found.start()}"
        )


def check_line(field: str, text: str, most: int) -> None:
    """Refuses a text of more characters, or of several lines, and what ``check_text`` refuses."""
    if len(text) > most:
        raise InvalidRequestError(field, f"has {len(text)} characters; at most {most} are allowed")
    check_text(field, text)
    if _LINE_BREAKS.search(text):
        raise InvalidRequestError(field, "must be one line without tabs")
