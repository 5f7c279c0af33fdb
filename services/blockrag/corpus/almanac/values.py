"""Parsers for single values of the fact book: messy text in, a clean string or nothing out.

The source mixes HTML, notes, years, units and words ("1.284 million sq km (2023 est.)<br>note: ..."). Every parser
is anchored at the start of the value: what it does not recognise is left out of the almanac instead of guessed.
"""

from __future__ import annotations

import html
import re
import unicodedata
from decimal import Decimal

_BREAK = re.compile(r"(?i)<br\s*/?>|</p>|</li>")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_NOTE = re.compile(r"[\s;,]*\bnote(?:\s*\d+)?\s*(?:[:–—]|-\s).*", re.DOTALL)
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "`": "'"})
_MISSING = re.compile(r"(?i)(?:N/?A|none|unknown|not available|-{1,2})?%?[.,;:]?")
_LABEL = re.compile(r"^[a-z][a-z ]*:\s*")
_ABOUT = (
    r"(?:(?:approximately|about|nearly|estimated|an estimated|over|under|less than|more than|ca\.?|up to)\s+|[<~]\s*)?"
)
_SCALES = {
    "thousand": Decimal(10**3),
    "million": Decimal(10**6),
    "billion": Decimal(10**9),
    "trillion": Decimal(10**12),
}
_NUMBER = re.compile(
    rf"{_ABOUT}(?P<sign>-?)\s*(?P<money>\$?)\s*(?P<digits>\d[\d,]*(?:\.\d+)?)(?![\d,.]*\d)"
    r"(?:\s*(?P<scale>thousand|million|billion|trillion)\b)?"
)
_RANGE = re.compile(r"\s*(?:-|–|to)\s*[\d<$]")
_YEAR = re.compile(r"\((?:[A-Z][a-z]+ |FY\s?)?((?:1[6-9]|20)\d\d)(?:\s*[-/–]\s*(\d{4}|\d{2}))?(?: ?est\.?)?\)")


def clean(raw: str) -> str:
    """Plain text of a value: no markup, no notes, straight quotes, single spaces."""
    text = html.unescape(html.unescape(raw))
    text = _TAG.sub("", _BREAK.sub("; ", text))
    # "<" and ">" that are left are comparisons ("<1%"); the parsers know the first, nobody needs the second.
    text = unicodedata.normalize("NFC", text).translate(_QUOTES).replace(">", "").replace("''", '"')
    text = _NOTE.sub("", " ".join(text.split()))
    # Full stops of abbreviations would end a sentence for a splitter.
    text = re.sub(r"\bSt\. ", "Saint ", re.sub(r"\bMt\. ", "Mount ", text))
    text = re.sub(r"\s+([,;:.)])", r"\1", text)
    text = re.sub(r"([,;])(?:\s*[,;])+", r"\1", text)
    return text.strip(" ;,")


def present(raw: str) -> str | None:
    """`clean`, or None where the source says that it has no value ("NA", "none")."""
    text = clean(raw)
    return None if _MISSING.fullmatch(text) or text.startswith(("NA ", "NA;", "NA,", "none;", "none (")) else text


def year_phrase(text: str) -> str:
    """``" in 2024"`` for "... (2024 est.)", ``" between 2020 and 2025"`` for a span, "" where no year is given."""
    match = _YEAR.search(text)
    if match is None:
        return ""
    first, last = match.groups()
    if last is None:
        return f" in {first}"
    if len(last) == 2:
        last = first[:2] + last
    return f" between {first} and {last}" if int(last) > int(first) else f" in {first}"


def magnitude(text: str) -> Decimal | None:
    """The number at the start of `text` as a number ("1.284 million" is 1284000), None for ranges and words."""
    match = _match(text)
    if match is None:
        return None
    value = Decimal(match["digits"].replace(",", "")) * _SCALES.get(match["scale"] or "", Decimal(1))
    return -value if match["sign"] else value


def amount(text: str) -> str | None:
    """The number at the start of `text` as the almanac writes it: "147,200", "4.534 million", "-0.35"."""
    match = _match(text)
    if match is None:
        return None
    digits = _grouped(Decimal(match["digits"].replace(",", "")))
    scale = f" {match['scale']}" if match["scale"] else ""
    return f"{match['sign'] if digits != '0' else ''}{digits}{scale}"


def whole(text: str) -> str | None:
    """Like `amount` with the scale written out: "1.284 million" is "1,284,000"."""
    value = magnitude(text)
    return None if value is None else _grouped(value)


def percent(text: str) -> str | None:
    """The percentage at the start of `text`: "31.5% (2023 est.)" is "31.5 percent"."""
    match = _match(text)
    if match is None or match["scale"] or not _unlabelled(text)[match.end() :].lstrip().startswith("%"):
        return None
    return f"{amount(text)} percent"


def money(text: str) -> str | None:
    """The sum in dollars at the start of `text`: "$581.131 billion (2024 est.)" is "$581.131 billion"."""
    match = _match(text)
    value = amount(text)
    if match is None or value is None or not match["money"] or match["sign"]:
        return None
    return f"${value}"


def _unlabelled(text: str) -> str:
    return _LABEL.sub("", text.strip())


def _match(text: str) -> re.Match[str] | None:
    body = _unlabelled(text)
    match = _NUMBER.match(body)
    if match is None or _RANGE.match(body, match.end()):
        return None
    # A letter straight after the number means that it was part of a word ("16th", "2nd").
    rest = body[match.end() : match.end() + 1]
    return None if rest.isalpha() else match


def _grouped(value: Decimal) -> str:
    text = f"{value:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
