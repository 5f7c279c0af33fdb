"""Filters as a person types them: ``region=Africa``, ``year>=1990``, ``kind!=draft,old``, ``city="Paris, France"``.

What looks like a number finds the number and the text, since a document may have either; what stands in quotes, and
what has leading zeros, is text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from blockrag.errors import InvalidRequestError
from blockrag.metadata import MAX_EXACT
from blockrag.results import Condition

_FORM = re.compile(r"(?P<key>[^=!<>]+?)\s*(?P<sign>!=|>=|<=|=)\s*(?P<values>.*)", re.DOTALL)
_PART = re.compile(r'(?:^|(?<=,))(\s*"(?:[^"\\]|\\.)*"\s*|[^,"][^,]*|)(?=,|$)', re.DOTALL)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_OPERATORS: dict[str, Literal["in", "not_in", "at_least", "at_most"]] = {
    "=": "in",
    "!=": "not_in",
    ">=": "at_least",
    "<=": "at_most",
}


def parse_filters(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Conditions that must all hold. Raises ``InvalidRequestError`` for a text that is none."""
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> Condition:
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError("filter", f"{text!r}: write key=value, key!=value, key>=number or key<=number")
    operator = _OPERATORS[match["sign"]]
    if operator in ("at_least", "at_most"):
        bound = _number(match["values"].strip())
        if bound is None:
            raise InvalidRequestError("filter", f"{text!r}: {match['sign']} needs a number")
        return Condition(match["key"], operator, (bound,))
    return Condition(match["key"], operator, tuple(value for part in _parts(text, match) for value in _values(part)))


def _parts(text: str, match: re.Match[str]) -> list[str]:
    """What stands between commas; a comma in quotes is a character."""
    parts = _PART.findall(match["values"])
    if ",".join(parts) != match["values"]:
        raise InvalidRequestError("filter", f'{text!r}: a quote is not closed; write a quote within as \\"')
    return [part.strip() for part in parts]


def _values(part: str) -> tuple[str | float | bool, ...]:
    """What a part may stand for: 7 is a number, or a text of one digit; what is quoted is text."""
    if _QUOTED.fullmatch(part):
        return (re.sub(r"\\(.)", r"\1", part[1:-1]),)
    if part in ("true", "false"):
        return (part == "true", part)
    number = _number(part)
    # No document has a whole number that a double cannot hold: whoever keeps one keeps it as text.
    return (part,) if number is None or abs(number) >= MAX_EXACT else (number, part)


def _number(text: str) -> float | None:
    """As JSON writes numbers: 01234 is none, nor is nan."""
    if not _NUMBER.fullmatch(text):
        return None
    # The client refuses a whole number that would not be exact.
    return int(text) if text.removeprefix("-").isdecimal() else float(text)
