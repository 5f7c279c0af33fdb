"""Articles: sections in their order, put together as markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blockrag.corpus.almanac import economy, geography, government, history, infrastructure, introduction, people
from blockrag.corpus.almanac.profile import Profile, read_profiles
from blockrag.corpus.almanac.writing import Statement, Writer

SEED = 20260101
"""Seed of the shipped almanac; another one gives other wordings and other questions from the same facts."""

_SENTENCES_PER_PARAGRAPH = 4
"""About what a passage of 128 tokens holds, so that paragraphs and passages mostly coincide."""

_SECTIONS: tuple[tuple[str, Callable[[Writer], None]], ...] = (
    ("", introduction.introduce),
    ("Geography", geography.geography),
    ("History and symbols", history.history),
    ("Government", government.government),
    ("People", people.people),
    ("Health and education", people.health),
    ("Economy", economy.economy),
    ("Trade", economy.trade),
    ("Energy", infrastructure.energy),
    ("Transport", infrastructure.transport),
    ("Communications", infrastructure.communications),
    ("Environment", geography.environment),
    ("Military and space", government.military),
)


@dataclass(frozen=True)
class WrittenArticle:
    """An article with the statements that it is made of."""

    id: str
    title: str
    text: str
    metadata: dict[str, str]
    statements: tuple[Statement, ...]

    def to_dict(self) -> dict[str, object]:
        """The article's line in the corpus file."""
        return {"id": self.id, "title": self.title, "text": self.text, "metadata": self.metadata}


def write_article(profile: Profile, seed: int = SEED) -> WrittenArticle:
    """The article of one country; the same profile and seed always give the same text."""
    blocks: list[str] = []
    statements: list[Statement] = []
    for heading, write in _SECTIONS:
        writer = Writer(profile, seed)
        write(writer)
        # A sentence that answers two questions was said twice.
        found = list(dict.fromkeys(statement.text for statement in writer.statements))
        if not found:
            continue
        if heading:
            blocks.append(f"## {heading}")
        for start in range(0, len(found), _SENTENCES_PER_PARAGRAPH):
            blocks.append(" ".join(found[start : start + _SENTENCES_PER_PARAGRAPH]))
        statements += writer.statements
    country = profile.country
    metadata = {"region": country.region.removeprefix("the "), "code": country.code}
    return WrittenArticle(country.slug, country.title, "\n\n".join(blocks) + "\n", metadata, tuple(statements))


def write_articles(archive: Path, seed: int = SEED) -> Iterator[WrittenArticle]:
    """All articles of a fact book archive, by id."""
    for profile in read_profiles(archive):
        yield write_article(profile, seed)
