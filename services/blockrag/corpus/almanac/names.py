"""What a country is called: in a title, inside a sentence, and when another country's facts mention it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from blockrag.corpus.almanac.lists import without_brackets

_TITLES = {
    "bm": "Myanmar",
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "fm": "Federated States of Micronesia",
    "gz": "Gaza Strip",
    "io": "British Indian Ocean Territory",
    "sv": "Svalbard",
    "sx": "South Georgia and the South Sandwich Islands",
    "um": "United States Pacific Island Wildlife Refuges",
    "vq": "United States Virgin Islands",
    "vi": "British Virgin Islands",
    "vt": "Vatican City",
}
"""Titles where the source's short form is missing, abbreviated, ambiguous or not what people type."""

_MENTIONS = {
    "US": "the United States",
    "USA": "the United States",
    "NZ": "New Zealand",
    "UK": "the United Kingdom",
    "UAE": "the United Arab Emirates",
    "DRC": "the Democratic Republic of the Congo",
    "Burma": "Myanmar",
    "Czech Republic": "Czechia",
    "Cote d'Ivoire": "Côte d'Ivoire",
    "Holy See": "Vatican City",
    "Bahamas": "the Bahamas",
    "Gambia": "the Gambia",
}
_ARTICLE = re.compile(
    r"(?:United|Federated|Democratic Republic|Republic of|Dominican Republic|Central African Republic|British"
    r"|French Southern|Isle of|Gaza Strip|West Bank|Netherlands$|Philippines$|Maldives$|Comoros$|Seychelles$)"
    r"|(?!Heard|South Georgia).*Islands$|.*Wildlife Refuges$"
)
_SINGULAR_ISLANDS = frozenset({"Solomon Islands", "Marshall Islands"})


@dataclass(frozen=True)
class Country:
    """A country or territory as the almanac names it."""

    code: str
    """Two letters of the source (GEC, not ISO)."""
    title: str
    region: str
    """The source's folder in words, for example ``Africa``."""

    @property
    def ref(self) -> str:
        """The name inside a sentence: ``Fiji``, ``the United Kingdom``, ``the Bahamas``."""
        return mention(self.title)

    @property
    def plural(self) -> bool:
        return self.title.endswith(("Islands", "Lands", "Refuges")) and self.title not in _SINGULAR_ISLANDS

    @property
    def slug(self) -> str:
        """The article's id: ``fiji``, ``cote-d-ivoire``."""
        plain = self.title.lower().translate(str.maketrans("áéíóúôçãå", "aeiouocaa"))
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")

    def words(self) -> dict[str, str]:
        """Fields that a template may use: the name and verbs that agree with it."""
        one = not self.plural
        return {
            "c": self.ref,
            "is": "is" if one else "are",
            "has": "has" if one else "have",
            "was": "was" if one else "were",
            "s": "s" if one else "",
        }


def title_of(code: str, short: str | None, long: str | None) -> str | None:
    """The article's title from the source's short and long form; None where it has neither."""
    if code in _TITLES:
        return _TITLES[code]
    name = without_brackets((short or long or "").split(";")[0])
    return name or None


def mention(name: str) -> str:
    """A country's name inside a sentence, with the article that it takes."""
    bare = without_brackets(name)
    bare = re.sub(r"^The ", "", bare)
    if bare in _MENTIONS:
        return _MENTIONS[bare]
    return f"the {bare}" if _ARTICLE.match(bare) else bare


def expand(text: str) -> str:
    """`text` with the source's abbreviations of countries written out."""
    text = re.sub(r"\b(?:the )?(?:US|USA)\b(?! dollar)", "the United States", text)
    text = re.sub(r"\b(?:the )?UK\b", "the United Kingdom", text)
    text = re.sub(r"\b(?:the )?UAE\b", "the United Arab Emirates", text)
    return re.sub(r"\bNZ\b", "New Zealand", text)
