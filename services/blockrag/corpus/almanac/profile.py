"""Access to the facts of one country: an archive of JSON files in, cleaned values out."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockrag.corpus.almanac.names import Country, title_of
from blockrag.corpus.almanac.values import present

_REGIONS = {
    "africa": "Africa",
    "antarctica": "Antarctica",
    "australia-oceania": "Oceania",
    "central-america-n-caribbean": "Central America and the Caribbean",
    "central-asia": "Central Asia",
    "east-n-southeast-asia": "East and Southeast Asia",
    "europe": "Europe",
    "middle-east": "the Middle East",
    "north-america": "North America",
    "south-america": "South America",
    "south-asia": "South Asia",
}
_NOT_COUNTRIES = frozenset({"ee"})
"""The European Union: its facts are sums over its members."""


class Profile:
    """Facts of one country, by path of the source's headings."""

    def __init__(self, country: Country, facts: dict[str, Any]) -> None:
        self.country = country
        self._facts = facts

    def text(self, *path: str) -> str | None:
        """The cleaned value under `path`, or None where the source has none."""
        node: Any = self._facts
        for name in path:
            node = _child(node, name)
        return _value(node)

    def latest(self, *path: str) -> str | None:
        """The value of the last year under `path` ("Exports 2024" before "Exports 2023"), or the plain value."""
        node: Any = self._facts
        for name in path:
            node = _child(node, name)
        if not isinstance(node, dict):
            return None
        by_year = {int(key[-4:]): value for key, value in node.items() if re.fullmatch(r".* \d{4}", key)}
        for year in sorted(by_year, reverse=True):
            if (text := _value(by_year[year])) is not None:
                return text
        return _value(node)


def read_profiles(archive: Path) -> Iterator[Profile]:
    """Profiles of all countries and territories of a fact book archive (``REGION/CODE.json`` in a tar file), by title.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no tar archive, or holds no profile.
    """
    try:
        profiles = _read(archive)
    except (tarfile.TarError, json.JSONDecodeError) as error:
        raise ValueError(f"{archive} is not a fact book archive: {error}") from error
    if not profiles:
        raise ValueError(f"{archive} holds no country profiles (REGION/CODE.json)")
    yield from sorted(profiles, key=lambda profile: profile.country.slug)


def _read(archive: Path) -> list[Profile]:
    profiles = []
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts[-2:]
            if len(parts) != 2 or parts[0] not in _REGIONS or not parts[1].endswith(".json"):
                continue
            code = parts[1].removesuffix(".json")
            stream = tar.extractfile(member)
            if stream is None or code in _NOT_COUNTRIES:
                continue
            profile = make_profile(code, parts[0], json.load(stream))
            if profile is not None:
                profiles.append(profile)
    return profiles


def make_profile(code: str, folder: str, facts: dict[str, Any]) -> Profile | None:
    """The profile of one file, or None where the source does not name the country."""
    name = ("Government", "Country name")
    draft = Profile(Country(code, "", ""), facts)
    title = title_of(code, draft.text(*name, "conventional short form"), draft.text(*name, "conventional long form"))
    return None if title is None else Profile(Country(code, title, _REGIONS[folder]), facts)


def _child(node: Any, name: str) -> Any:
    if not isinstance(node, dict):
        return None
    if name in node:
        return node[name]
    # Some headings of the source end in a space ("total ").
    return next((value for key, value in node.items() if key.strip() == name), None)


def _value(node: Any) -> str | None:
    if isinstance(node, dict):
        node = node.get("text")
    return present(node) if isinstance(node, str) else None
