"""Filters as a person types them: ``region=Africa``, ``year>=1990``, ``kind!=draft,old``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from blockrag.errors import InvalidRequestError
from blockrag.results import Condition

_FORM = re.compile(r"(?P<key>[^=!<>]+?)\s*(?P<sign>!=|>=|<=|=)\s*(?P<values>.*)", re.DOTALL)
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
        bound = _value(match["values"])
        if isinstance(bound, str | bool):
            raise InvalidRequestError("filter", f"{text!r}: {match['sign']} needs a number")
        return Condition(match["key"], operator, (bound,))
    return Condition(match["key"], operator, tuple(_value(part) for part in match["values"].split(",")))


def _value(text: str) -> str | float | bool:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    quoted = re.fullmatch(r'"(.*)"', text)
    if quoted:
        return quoted[1]
    try:
        return float(text)
    except ValueError:
        return text
