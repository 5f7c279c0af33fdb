"""Parsers for values of the fact book that hold several things: shares, borders, capitals, persons, dates."""

from __future__ import annotations

import re
from dataclasses import dataclass

from blockrag.corpus.almanac.values import amount

_ROMAN = re.compile(r"[IVX]+")
_PARTICLES = frozenset({"AL", "BIN", "DA", "DE", "DEL", "DER", "DI", "DOS", "DU", "LA", "LE", "VON", "Y"})
_HONORIFIC = re.compile(r"\b(?:Dr|Sr|Jr|Gen|Lt|Col|Mr|Mrs|Ms|Maj|Brig|Adm|Cdr|Capt|Sgt|[A-Z])\.(?=\s|,|$)")
_TITLE = re.compile(
    r"((?:Acting |Interim |Federal |Transitional |Transition |Caretaker |Executive )*"
    r"(?:President|Prime Minister|King|Queen|Emperor|Prince|Grand Duke|Sultan and Prime Minister|Sultan|Amir|Chancellor"
    r"|Premier|Pope|Taoiseach|Minister of State|Chief Minister|Governor|Taliban Leader|Minister-President|Mayor))\s+"
)
_DATE = re.compile(
    r"\b(\d{1,2}(?:-\d{1,2})? (?:January|February|March|April|May|June|July|August|September|October|November|December)"
    r"(?: \d{3,4})?)\b"
)
_SKIPPED_SHARES = (
    "other",
    "unspecified",
    "none",
    "not stated",
    "no ",
    "unknown",
    "less than",
    "more than",
    "includes",
    "and ",
)
_EMPTY = ("no ", "none", "other", "negligible", "note")
_SENTENCE = re.compile(
    r"\b(?:is|are|was|were|be|has|have|can|may|lies?|lasts?|blows?|occurs?|rise|rises|dominated|held|caused|leads?|due|from|of)\b"
)
"""Words that make a clause more than a name of a thing."""
_OFFICIAL = re.compile(r"([A-Z][^,;()%\d<]*?)\s*(?:<?[\d.]+\s*%\s*)?\((official[^()]*)\)")
_PARTLY_OFFICIAL = re.compile(r"\b(?:in|only|for|regional|minority|purposes|locally|co-official|by)\b")


@dataclass(frozen=True)
class Share:
    """A part of a whole: a language, a religion, a trade partner, with its percentage where the source has one."""

    name: str
    percent: str | None

    def __str__(self) -> str:
        return f"{self.name} ({self.percent} percent)" if self.percent else self.name


@dataclass(frozen=True)
class Person:
    """Somebody in office: title without the name, name in ordinary letters, first day in office."""

    title: str
    name: str
    since: str


def join(items: list[str]) -> str:
    """ "A", "A and B", "A, B and C"."""
    # Items that hold an "and" of their own need the comma to stay apart.
    last = ", and " if len(items) > 2 and any(" and " in item for item in items) else " and "
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}{last}{items[-1]}"


def without_brackets(text: str) -> str:
    """`text` without what stands in brackets, however deep."""
    previous = None
    while previous != text:
        previous, text = text, re.sub(r"\s*(?:\([^()]*\)|\[[^\[\]]*\])", "", text)
    # A bracket that never closes, or never opened, is cut with all that it holds.
    return re.sub(r"\s*[(\[].*$", "", text).replace(")", "").replace("]", "").strip()


def split(text: str, separators: str = ",;") -> list[str]:
    """Pieces of `text` between separators outside brackets and outside numbers ("1,000")."""
    pieces, depth, start = [], 0, 0
    for place, character in enumerate(text):
        if character in "([":
            depth += 1
        elif character in ")]":
            depth = max(0, depth - 1)
        elif character in separators and depth == 0 and not text[place + 1 : place + 2].isdigit():
            pieces.append(text[start:place])
            start = place + 1
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def items(text: str, most: int = 6, words: int = 5) -> list[str]:
    """Short items of an enumeration, without brackets; long clauses are left out."""
    found: list[str] = []
    for piece in split(text):
        item = re.sub(r"^(?:and|or) ", "", without_brackets(piece)).strip(" .*~")
        item = re.sub(r"(?<=[a-z])/(?=[a-z])", " or ", item)
        if (
            not item
            or len(item.split()) > words
            or item in found
            or item.startswith(_EMPTY)
            or re.search(r"[.:\"%<]|\bNA\b|\d", item)
        ):
            continue
        found.append(item)
    return found[:most]


def clauses(text: str, most: int) -> list[str]:
    """Short clauses of a list whose clauses may hold commas of their own ("a, b, and c; d")."""
    if ";" in text:
        text = ";".join(piece for piece in split(text, ";") if "," not in without_brackets(piece))
    return [item for item in items(text, 60, 6) if not is_sentence(item)][:most]


def is_sentence(text: str) -> bool:
    """Whether `text` holds a verb or a clause, so that it cannot stand in an enumeration."""
    return _SENTENCE.search(text) is not None


def shares(text: str, most: int = 4) -> list[Share]:
    """Named shares in the order of the source; "other" and its kind are left out."""
    found: list[Share] = []
    for piece in split(text):
        bare = re.sub(r"^(?:and|or) ", "", without_brackets(piece))
        match = re.fullmatch(r"([^\d<%]+?)\s*(?:(\d[\d.]*)\s*%)?", bare)
        if match is None:
            continue
        name = re.sub(r"(?<=[a-z])/(?=[a-z])", " or ", match[1].strip(" .*-~"))
        if not name or name.lower().startswith(_SKIPPED_SHARES) or len(name.split()) > 7 or re.search(r"[:.\"]", name):
            continue
        if all(share.name != name for share in found):
            found.append(Share(name, amount(match[2]) if match[2] else None))
    return found[:most]


def official_languages(text: str) -> list[str]:
    """Languages marked official for the whole country."""
    found: list[str] = []
    for name, mark in _OFFICIAL.findall(text):
        language = re.sub(r"^.*\b(?:includes|and|or)\s+", "", name.strip())
        if language and len(language.split()) <= 3 and not _PARTLY_OFFICIAL.search(mark) and language not in found:
            found.append(language)
    return found


def lengths(text: str) -> list[tuple[str, str]]:
    """Neighbours and the kilometres shared with them: "Greece 212 km; Kosovo 112 km"."""
    found = []
    for piece in split(text, ";"):
        match = re.match(r"(.+?)\s+(\d[\d,.]*) km\b", without_brackets(piece))
        if match is not None and "Base" not in match[1] and (length := amount(match[2].rstrip(".,"))) is not None:
            found.append((match[1].strip(" ,:"), length))
    return found


def capitals(text: str) -> list[tuple[str, str]]:
    """Capital cities with their role ("" for a plain capital)."""
    if text.startswith(("no ", "administered")):
        return []
    found = []
    for piece in re.split(r";\s*|(?<=\)),\s*", text):
        match = re.match(r"([^()]+?)(?: in [A-Z][a-z]+)?\s*(?:\(([^()]*)\)?.*)?$", piece)
        if match is None or re.search(r"\b(?:is|located|of the year)\b", match[1]):
            continue
        role = match[2] if match[2] and "capital" in match[2] and len(match[2].split()) <= 4 else ""
        found.append((match[1].strip(), re.sub(r"\s*\[.*?\]|\s*capital", "", role).strip()))
    return found[:3] if all(role for _, role in found) else found[:1]


def elevation(text: str) -> tuple[str, str] | None:
    """Name and metres of a named point; None for an unnamed one."""
    match = re.match(r"(.+?)\s+(-?\d[\d,]*)(?:\s*m\b|$)", without_brackets(text.split(";")[0]))
    if match is None or re.match(r"(?:unnamed|\d|sea level|near|junction)", match[1]) or " km" in match[1]:
        return None
    metres = amount(match[2])
    return None if metres is None else (match[1].strip(" ,-"), metres)


def first_date(text: str) -> str | None:
    """The first full date of `text`, with or without its year."""
    match = _DATE.search(text)
    return match[1] if match is not None else None


def ordinary_name(text: str) -> str:
    """A person's name in ordinary letters; the source writes surnames in capitals.

    Initials and honorifics go: their full stops would end a sentence for a splitter.
    """
    text = _HONORIFIC.sub("", re.sub(r"\"[^\"]*\"|\([^()]*\)", "", text))
    words = text.replace(" ,", ",").strip(" ,").split()
    named: list[str] = []
    for place, word in enumerate(words):
        core = word.strip(",")
        if len(core) < 2 or not core.isupper() or _ROMAN.fullmatch(core):
            named.append(word)
        elif core in _PARTICLES and place > 0 and words[place - 1].isupper():
            named.append(word.lower())
        else:
            named.append("-".join(_capitalised(part) for part in word.split("-")))
    return " ".join(named)


def person(text: str) -> Person | None:
    """The first person of "President Alar KARIS (since 11 October 2021); represented by ..."."""
    match = re.match(r"([^;()]+?)\s*\(since ([^()]+)\)", re.sub(r"\"[^\"]*\"|\(([A-Z][a-z]+)\)", "", text))
    since = first_date(match[2]) if match is not None else None
    if match is None or since is None:
        return None
    title = _TITLE.match(match[1])
    name = ordinary_name(match[1][title.end() :] if title else match[1])
    if title is None or not name or re.search(r"\b(?:of|the|vacant|represented|and)\b|[,;:/]", name):
        return None
    return Person(title[1], name, since)


def _capitalised(word: str) -> str:
    if re.match(r"MC[A-Z]{2}", word):
        return f"Mc{word[2]}{word[3:].lower()}"
    head, mark, tail = word.partition("'")
    return f"{head}'{tail.capitalize()}" if mark and len(head) == 1 else word.capitalize()
