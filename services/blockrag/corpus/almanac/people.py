"""People and society of a country."""

from __future__ import annotations

import re
from decimal import Decimal

from blockrag.corpus.almanac.lists import join, ordinary_name, shares
from blockrag.corpus.almanac.names import expand
from blockrag.corpus.almanac.values import amount, magnitude, percent, year_phrase
from blockrag.corpus.almanac.writing import Figure, Writer

_P = "People and Society"
_COUNTS = (
    Figure(
        "median age",
        (_P, "Median age", "total"),
        amount,
        ("The median age in {c} {be} {v} years{y}.",),
        "years",
        "median_age",
    ),
    Figure(
        "urban",
        (_P, "Urbanization", "urban population"),
        percent,
        (
            "In {c}, {v} of the people lived in towns and cities{y}.",
            "The urban share of the population of {c} was {v}{y}.",
        ),
    ),
)
_HEALTH = (
    Figure(
        "life",
        (_P, "Life expectancy at birth", "total population"),
        amount,
        ("The life expectancy in {c} {be} {v} years{y}.",),
        "years",
        "life_expectancy",
    ),
    Figure(
        "infants",
        (_P, "Infant mortality rate", "total"),
        amount,
        ("The infant mortality rate of {c} {be} {v} deaths per 1,000 live births{y}.",),
        "deaths",
    ),
)
_EDUCATION = (
    Figure(
        "literacy",
        (_P, "Literacy", "total population"),
        percent,
        ("The literacy rate of {c} {be} {v}{y}.",),
        relation="literacy",
    ),
)


def people(writer: Writer) -> None:
    """Nationality, groups, languages, religions, cities and the numbers of the population."""
    profile = writer.profile
    if adjective := demonym(writer):
        writer.say(
            "nationality",
            ("People from {c} are of {v} nationality.",),
            v=adjective,
        )
    for key, path, one, many in (
        ("ethnic", ("Ethnic groups",), "The main ethnic group in {c} is {v}.", "The ethnic groups of {c} include {v}."),
        ("religion", ("Religions",), "The main religion in {c} is {v}.", "The religions of {c} include {v}."),
    ):
        found = shares(profile.text(_P, *path) or "")
        if found:
            writer.say(key, (many if len(found) > 1 else one,), v=expand(join([str(share) for share in found])))
            if key == "religion" and found[0].percent and len(found) > 1 and float(found[0].percent) > 50:
                writer.say(
                    "main religion",
                    ("The main religion of {c} is {v}.", "The largest religious group in {c} is {v}."),
                    relation="religion",
                    answers=(found[0].name,),
                    v=found[0].name,
                )
    spoken = shares(profile.text(_P, "Languages", "Languages") or profile.text(_P, "Languages") or "")
    if spoken:
        writer.say("languages", ("The languages spoken in {c} include {v}.",), v=join([str(share) for share in spoken]))
    _cities(writer)
    writer.figures(_COUNTS)
    refugees = profile.text("Transnational Issues", "Refugees and internally displaced persons", "refugees") or ""
    if (count := amount(refugees)) not in (None, "0"):
        writer.say("refugees", ("{c} hosted {v} refugees{y}.",), v=str(count), y=year_phrase(refugees))


def health(writer: Writer) -> None:
    """Health and education."""
    writer.figures(_HEALTH)
    writer.figures(_EDUCATION)


def demonym(writer: Writer) -> str | None:
    """The adjective of the nationality where the source gives exactly one."""
    adjective = writer.profile.text(_P, "Nationality", "adjective") or ""
    return adjective if re.fullmatch(r"[A-Z][\w'-]+(?: [A-Z][\w'-]+)?", adjective) else None


def _cities(writer: Writer) -> None:
    source = writer.profile.text(_P, "Major urban areas - population") or ""
    found = []
    for count, name in re.findall(r"(\d[\d,]*(?:\.\d+)? (?:million )?)([^\d,;(]+)", source):
        city = ordinary_name(name).strip(" -")
        if city and (people := amount(count)) is not None:
            found.append((city, people))
    if not found:
        return
    # The source may put the capital first, whatever its size.
    found.sort(key=lambda city: magnitude(city[1]) or Decimal(0), reverse=True)
    largest, count = found[0]
    year = year_phrase(source)
    writer.say(
        "largest city",
        (
            "The largest urban area of {c} is {v}, with {n} people{y}.",
            "{v} is the largest urban area of {c}, with {n} people{y}.",
        ),
        relation="largest_city" if len(found) > 1 else None,
        answers=(largest,),
        v=largest,
        n=count,
        y=year,
    )
    if len(found) > 1:
        writer.say(
            "cities",
            ("Other large urban areas of {c} are {v}.",)
            if len(found) > 2
            else ("Another large urban area of {c} is {v}.",),
            v=join([f"{city} ({people} people)" for city, people in found[1:4]]),
        )
