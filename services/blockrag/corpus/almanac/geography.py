"""Geography and environment of a country."""

from __future__ import annotations

import re

from blockrag.corpus.almanac.lists import clauses, elevation, items, join, lengths, split, without_brackets
from blockrag.corpus.almanac.names import expand, mention
from blockrag.corpus.almanac.values import amount, percent
from blockrag.corpus.almanac.writing import Figure, Writer

_G = "Geography"
_E = "Environment"
_SURFACE = (
    Figure(
        "coast",
        (_G, "Coastline"),
        amount,
        ("{c} {has} a coastline of {v} kilometres.", "The coastline of {c} is {v} kilometres long."),
        "km",
        "coastline",
    ),
)
_USE = (
    Figure(
        "farm", (_G, "Land use", "agricultural land"), percent, ("Agricultural land {be} {v} of the area of {c}{y}.",)
    ),
    Figure("forest", (_G, "Land use", "forest"), percent, ("Forests covered {v} of {c}{y}.",), relation="forest"),
)
_EMISSIONS = (
    Figure(
        "co2",
        (_E, "Carbon dioxide emissions", "total emissions"),
        amount,
        ("{c} emitted {v} metric tonnes of carbon dioxide{y}.",),
        "CO2",
    ),
)


def geography(writer: Writer) -> None:
    """Borders, surface, relief, waters and land use."""
    profile = writer.profile
    _borders(writer)
    writer.figures(_SURFACE)
    if "landlocked" in (profile.text(_G, "Coastline") or ""):
        writer.say("landlocked", ("{c} {is} landlocked and {has} no coast.", "{c} {is} landlocked."))
    _point(writer)
    climate = without_brackets(re.split(r"[;,]", profile.text(_G, "Climate") or "")[0])
    if climate and re.match(r"(?:mostly |extremely |predominantly )?[a-z]+(?:al|ate|ine|id|tic|rt|an|oon)\b", climate):
        writer.say("climate", ("The climate of {c} is {v}.",), relation="climate", answers=(climate,), v=climate)
    terrain = without_brackets(re.split(r"[;,]", profile.text(_G, "Terrain") or "")[0])
    if (
        terrain
        and len(terrain.split()) <= 12
        and terrain[0].islower()
        and not re.search(r"\b(?:is|are|rises?)\b", terrain)
    ):
        writer.say("terrain", ("The terrain of {c} can be described as {v}.",), v=terrain)
    resources = items(profile.text(_G, "Natural resources") or "")
    if len(resources) > 1:
        writer.say(
            "resources",
            ("The natural resources of {c} include {v}.", "Natural resources in {c} include {v}."),
            v=join(resources),
        )
    _waters(writer)
    hazards = clauses(profile.text(_G, "Natural hazards") or "", 5)
    if hazards:
        writer.say("hazards", ("Natural hazards in {c} include {v}.",), v=expand(join(hazards)))
    writer.figures(_USE)


def environment(writer: Writer) -> None:
    """Issues, emissions, waste and water."""
    profile = writer.profile
    issues = clauses(profile.text(_E, "Environmental issues") or "", 6)
    if issues:
        writer.say("issues", ("Environmental issues in {c} include {v}.",), v=expand(join(issues)))
    writer.figures(_EMISSIONS)


def _borders(writer: Writer) -> None:
    found = [
        (mention(name), km)
        for name, km in lengths(writer.profile.text(_G, "Land boundaries", "border countries") or "")
    ]
    if not found:
        return
    names = [name for name, _ in found]
    if len(names) == 1:
        templates = ("{c} border{s} only one country, {v}, along {km} kilometres.",)
        writer.say("borders", templates, relation="borders", answers=names, v=names[0], km=found[0][1])
        return
    writer.say("borders", ("{c} border{s} {v}.", "{c} share{s} borders with {v}."), v=join(names))
    name, km = max(found, key=lambda border: float(border[1].replace(",", "")))
    writer.say("longest border", ("The longest border of {c} is with {v}, at {km} kilometres.",), v=name, km=km)


def _point(writer: Writer) -> None:
    highest = elevation(writer.profile.text(_G, "Elevation", "highest point") or "")
    if highest is not None:
        name, metres = highest
        short = re.split(r" (?:on|of|in) |/", name)[0]
        templates = (
            "The highest point of {c} is {v}, at {m} metres above sea level.",
            "{v}, located in {c}, is the highest point of {c}, at {m} metres above sea level.",
        )
        place = (writer.profile.country.ref, writer.profile.country.title)
        writer.say("highest", templates, relation="highest_point", answers=(name, short), v=name, m=metres)
        if name == short and "located" in writer.statements[-1].text:
            writer.say("highest", templates, relation="located", about=name, answers=place, v=name, m=metres)
    lowest = elevation(writer.profile.text(_G, "Elevation", "lowest point") or "")
    if lowest is not None:
        name, metres = lowest
        sea = re.search(r"(?:Ocean|Sea|Gulf|Strait|Bay|River|Channel|Lake)s?$", name) and not name.startswith("Lake")
        name = f"the {name}" if sea else name
        height = (
            "sea level"
            if metres == "0"
            else f"{metres.lstrip('-')} metres {'below' if metres[0] == '-' else 'above'} sea level"
        )
        writer.say("lowest", ("The lowest point of {c} is {v}, at {m}.",), v=name, m=height)


def _waters(writer: Writer) -> None:
    for key, path, noun, unit in (
        ("rivers", "Major rivers (by length in km)", "rivers", "kilometres long"),
        ("lakes", "Major lakes (area sq km)", "lakes", "square kilometres in area"),
    ):
        source = writer.profile.text(_G, path) or writer.profile.text(_G, path, "fresh water lake(s)") or ""
        found = []
        for piece in split(source, ";"):
            # "Donau (Danube) (shared with ...)": the first bracket holds the English name.
            english = re.match(r"[^()]+\(((?!shared|endo|salt)[A-Z][^()]+)\)", piece)
            match = re.match(r"(.+?)\s*-\s*(\d[\d,]*)", without_brackets(piece).replace("*", ""))
            if match is not None and (size := amount(match[2].rstrip(","))) is not None:
                name = re.sub(r"\s+river (?:source|mouth).*$", "", english[1] if english else match[1]).strip(" ,")
                found.append(f"{name} ({size} {unit})")
        if found:
            writer.say(key, (f"Major {noun} in {{c}} include {{v}}.",), v=join(found[:4]))
