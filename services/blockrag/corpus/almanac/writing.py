"""Writing: templates, the seeded choice between them, and the table form of one-number facts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blockrag.corpus.almanac.profile import Profile
from blockrag.corpus.almanac.values import magnitude, year_phrase

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Statement:
    """One sentence of an article and, where it can be asked for, what it answers."""

    text: str
    relation: str | None = None
    about: str = ""
    """What a question would name: the country, or the thing that the sentence is about."""
    answers: tuple[str, ...] = ()
    """Strings of `text` that answer the question, the best first."""


@dataclass(frozen=True)
class Figure:
    """A fact that is one number: where it stands, how it is read, how it is written.

    Templates see ``{v}`` (the number as written), ``{y}`` (" in 2024" or ""), ``{be}`` ("was" with a year, else "is"),
    ``{pl}`` ("" after 1, else "s") and the fields of `Country.words`.
    """

    key: str
    path: tuple[str, ...]
    read: Callable[[str], str | None]
    templates: tuple[str, ...]
    unit: str = ""
    """Text that the source's value must hold; another unit would make the sentence wrong."""
    relation: str | None = None
    latest: bool = False
    """Whether the path holds one value a year."""


@dataclass
class Writer:
    """Collects the statements of one section of one country's article."""

    profile: Profile
    seed: int
    statements: list[Statement] = field(default_factory=list)

    def say(
        self,
        key: str,
        templates: Sequence[str],
        *,
        relation: str | None = None,
        about: str | None = None,
        answers: Sequence[str] = (),
        **values: str,
    ) -> None:
        """Write one sentence from one of `templates`; the choice depends on seed, country and `key` alone."""
        country = self.profile.country
        template = templates[self._pick(key, len(templates))]
        text = _SPACES.sub(" ", template.format(**country.words(), **values)).strip()
        text = text[0].upper() + text[1:]
        # A value that ends in a full stop of its own ("Washington, D.C.") must not leave two.
        text = re.sub(r"\.\.$", ".", text)
        known = tuple(dict.fromkeys(answer for answer in answers if answer and answer in text))
        self.statements.append(Statement(text, relation if known else None, about or country.ref, known))

    def figures(self, table: Sequence[Figure]) -> None:
        """Write a sentence for each figure that the profile has; zeros and other units are left out."""
        for figure in table:
            source = (self.profile.latest if figure.latest else self.profile.text)(*figure.path)
            if source is None or figure.unit not in source or magnitude(source) in (None, 0):
                continue
            value = figure.read(source)
            if value is None:
                continue
            year = year_phrase(source)
            # With and without the unit, whichever word of the template that is.
            units = {word for template in figure.templates for word in re.findall(r"{v} ([a-z-]+)", template)}
            self.say(
                figure.key,
                figure.templates,
                relation=figure.relation,
                answers=(value, value.removesuffix(" percent"), *sorted(f"{value} {unit}" for unit in units)),
                v=value,
                y=year,
                be="was" if year else "is",
                pl="" if value == "1" else "s",
            )

    def _pick(self, key: str, choices: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/{self.profile.country.code}/{key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % choices


def indefinite(words: str) -> str:
    """``words`` with "a" or "an": "an island country", "a European state"."""
    vowel = re.match(r"(?i)[aeio]|u(?!nit|niv|k|s|g|r)", words) and not re.match(r"(?i)eu|one\b", words)
    return f"an {words}" if vowel else f"a {words}"
