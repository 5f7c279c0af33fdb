"""The lead of an article: what the country is, where it lies, its names, capital, people and size."""

from __future__ import annotations

import re

from blockrag.corpus.almanac.currencies import currency
from blockrag.corpus.almanac.lists import capitals, items, join, official_languages, without_brackets
from blockrag.corpus.almanac.names import expand
from blockrag.corpus.almanac.values import whole, year_phrase
from blockrag.corpus.almanac.writing import Writer

_KINDS = {
    "ay": "a continent",
    "gz": "a Palestinian territory",
    "pf": "a group of disputed islands",
    "pg": "a group of disputed islands and reefs",
    "tw": "an island",
    "um": "a group of island territories of the United States",
    "we": "a Palestinian territory",
    "wi": "a disputed territory",
}
"""Where the source's own words would not make a noun phrase."""

_REGION = re.compile(
    r"((?:[\w-]+ ){0,3}(?:Africa|Europe|Asia|America|Oceania|Caribbean|Middle East|Mediterranean))\b[,;]?\s*(.*)"
)
_SEA = re.compile(
    r"(?:[a-z, ]*\b(?:islands?|islets|archipelago|atolls?|island groups?|reefs)\b[^,]*?) (in|between) (the .+)"
)
_STATUS = (
    (r"overseas (territory|collectivity|country|land) of (the UK|France)", "an overseas {0} of {1}"),
    (r"crown dependency", "a British crown dependency"),
    (r"constituent countries of the Kingdom", "a constituent country of the Kingdom of the Netherlands"),
    (r"part of the Kingdom of Denmark", "a self-governing part of the Kingdom of Denmark"),
    (r"special administrative region", "a special administrative region of China"),
    (r"in free association with New Zealand", "a self-governing state in free association with New Zealand"),
    (r"commonwealth in political union", "a commonwealth in political union with the United States"),
    (
        r"(?i)(?:territory|possession|collectivity) of (the US|France|Australia|Norway|New Zealand)",
        "a territory of {0}",
    ),
    (r"UK overseas territory", "an overseas territory of the United Kingdom"),
)


def introduce(writer: Writer) -> None:
    """Write the lead."""
    _locate(writer)
    _names(writer)
    _capital(writer)
    _population(writer)
    area = writer.profile.text("Geography", "Area", "total")
    if area and "sq km" in area and (size := whole(area)):
        value = f"{size} square kilometres"
        writer.say(
            "area",
            ("{c} {has} a total area of {v}.", "The total area of {c} is {v}.", "{c} cover{s} an area of {v}."),
            relation="area",
            answers=(value, size),
            v=value,
        )
    _languages(writer)
    _currency(writer)


def kind_of(writer: Writer, island: bool) -> str:
    """What the country is, without where: "a landlocked country", "an overseas territory of France"."""
    profile = writer.profile
    if profile.country.code in _KINDS:
        return _KINDS[profile.country.code]
    status = profile.text("Government", "Dependency status")
    for pattern, phrase in _STATUS if status else ():
        if match := re.search(pattern, status or ""):
            return phrase.format(*(expand(group) for group in match.groups()))
    coast = profile.text("Geography", "Coastline") or ""
    return "a landlocked country" if "landlocked" in coast else "an island country" if island else "a country"


def _locate(writer: Writer) -> None:
    profile = writer.profile
    location = profile.text("Geography", "Location") or ""
    location = re.sub(r"^metropolitan France:\s*", "", expand(without_brackets(location.split(";")[0]))).replace(
        " km ", " kilometres "
    )
    match = _REGION.match(location)
    region = match[1][0].upper() + match[1][1:] if match else profile.country.region
    detail = (match[2] if match else location).strip(" ,")
    if region.endswith(("Caribbean", "Middle East", "Mediterranean")) and not region.startswith(("the ", "Central ")):
        region = f"the {region}"
    sea = _SEA.match(detail)
    kind = kind_of(writer, island=bool(re.match(r"(?:\S+ ){0,4}?(?:islands?|archipelago|atolls?)\b(?! of)", detail)))
    writer.say(
        "kind",
        ("{c} {is} {kind} in {region}.",),
        relation="is_a",
        answers=(f"{kind} in {region}", *(() if kind == "a country" else (kind, kind.split(" ", 1)[1]))),
        kind=kind,
        region=region,
    )
    if sea is not None:
        place = f"between {sea[2]}" if sea[1] == "between" else sea[2]
        first = re.split(r", (?=[a-z0-9])", place)[0]
        sentence = place if sea[1] == "between" else f"in {place}"
        answers = (first.removeprefix("between "), place, region)
    elif detail and match:
        sentence = f"in {region}, {detail}" if re.match(r"[a-z0-9]", detail) else f"in {region}"
        answers = (region, f"{region}, {detail}", detail)
    else:
        sentence, answers = f"in {region}", (region, "", "")
    writer.say(
        "located",
        ("{c} {is} located {place}.",),
        relation="located",
        answers=(*answers, re.sub(r"^the ", "", answers[0])),
        place=sentence,
    )


def _names(writer: Writer) -> None:
    profile = writer.profile
    title = profile.country.title.removeprefix("The ")
    path = ("Government", "Country name")
    long = without_brackets((profile.text(*path, "conventional long form") or "").split(";")[0]).removeprefix("The ")
    if long and long != title:
        official = long if long.startswith(("Saint", "Antigua", "Pitcairn")) else f"the {long}"
        writer.say(
            "official",
            ("{c} {is} officially known as {v}.", "{c} {is} also known as {v}."),
            relation="known_as",
            answers=(official, long),
            v=official,
        )
    local = without_brackets(re.split(r"[;/(]", profile.text(*path, "local short form") or "")[0])
    if local and local not in (title, long):
        writer.say("local", ("{c} {is} known locally as {v}.",), v=local)
    former = [name for name in items(profile.text(*path, "former") or "", 3, 6) if name not in (title, long)]
    if former:
        writer.say("former", ("{c} {was} formerly known as {v}.",), v=join(former))
    if profile.country.code == "bm":
        writer.say("burma", ("{c} {is} also known as {v}.",), relation="known_as", answers=("Burma",), v="Burma")


def _capital(writer: Writer) -> None:
    found = capitals(writer.profile.text("Government", "Capital", "name") or "")
    title = writer.profile.country.title
    if len(found) == 1:
        city = found[0][0]
        # A capital named after its country makes a question that holds its answer.
        telling = title.split()[-1] not in city and city not in title
        templates = ("{v} is the capital of {c}.", "The capital of {c} is {v}.")
        writer.say("capital", templates, relation="capital" if telling else None, answers=(city,), v=city)
        if telling:
            place = (writer.profile.country.ref, title)
            writer.say("capital", templates, relation="capital_of", about=city, answers=place, v=city)
    elif found:
        for city, role in found:
            writer.say(f"capital {city}", ("{v} is the {role} capital of {c}.",), v=city, role=role)


def _population(writer: Writer) -> None:
    profile = writer.profile
    source = profile.text("People and Society", "Population", "total") or profile.text(
        "People and Society", "Population"
    )
    if source is None:
        return
    year = year_phrase(source)
    count = whole(re.sub(r"^\(\d{4}\)\s*", "", source))
    if count is not None:
        writer.say(
            "population",
            ("{c} had a population of {v}{y}.", "The population of {c} was {v}{y}."),
            relation="population",
            answers=(count,),
            v=count,
            y=year or (re.match(r"\((\d{4})\)", source) or [""])[0].replace("(", " in ").replace(")", ""),
        )
    elif re.search(r"uninhabited|no (?:permanent|indigenous) inhabitants", source):
        writer.say("population", ("{c} {has} no permanent population.", "{c} {has} no permanent inhabitants."))


def _languages(writer: Writer) -> None:
    profile = writer.profile
    source = profile.text("People and Society", "Languages", "Languages") or profile.text(
        "People and Society", "Languages"
    )
    official = official_languages(source or "")
    if len(official) == 1:
        writer.say(
            "official language",
            ("The official language of {c} is {v}.", "{v} is the official language of {c}."),
            relation="official_language",
            answers=official,
            v=official[0],
        )
    elif official:
        writer.say("official language", ("The official languages of {c} are {v}.",), v=join(official[:6]))


def _currency(writer: Writer) -> None:
    path = ("Economy", "Exchange rates")
    found = currency(writer.profile.text(*path, "Currency") or writer.profile.text(*path) or "")
    if found is not None:
        name, code = found
        writer.say(
            "currency",
            ("The currency of {c} is the {v}.", "{c} use{s} the {v} as its currency."),
            relation="currency",
            answers=(name,),
            v=f"{name} ({code})" if code else name,
        )
