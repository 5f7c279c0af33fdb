"""Economy and trade of a country."""

from __future__ import annotations

from blockrag.corpus.almanac.lists import items, join, shares
from blockrag.corpus.almanac.names import mention
from blockrag.corpus.almanac.values import money, percent, year_phrase
from blockrag.corpus.almanac.writing import Figure, Writer

_E = "Economy"
_OUTPUT = (
    Figure(
        "gdp",
        (_E, "GDP (official exchange rate)"),
        money,
        ("The gross domestic product of {c} {be} {v}{y}.", "{c} had a gross domestic product of {v}{y}."),
        "$",
        "gdp",
    ),
    Figure(
        "per head",
        (_E, "Real GDP per capita"),
        money,
        ("The output per person of {c} {be} {v}{y}.",),
        "$",
        latest=True,
    ),
    Figure(
        "inflation",
        (_E, "Inflation rate (consumer prices)"),
        percent,
        ("The inflation rate of {c} {be} {v}{y}.",),
        relation="inflation",
        latest=True,
    ),
)
_WORK = (
    Figure(
        "unemployed",
        (_E, "Unemployment rate"),
        percent,
        ("The unemployment rate of {c} {be} {v}{y}.",),
        relation="unemployment",
        latest=True,
    ),
)
_STATE = ()
_TRADE = (
    Figure(
        "exports",
        (_E, "Exports"),
        money,
        ("The exports of {c} were worth {v}{y}.", "{c} exported goods and services worth {v}{y}."),
        "$",
        "exports",
        latest=True,
    ),
    Figure(
        "imports",
        (_E, "Imports"),
        money,
        ("The imports of {c} were worth {v}{y}.", "{c} imported goods and services worth {v}{y}."),
        "$",
        "imports",
        latest=True,
    ),
)


def economy(writer: Writer) -> None:
    """Output, products, work and public money."""
    writer.figures(_OUTPUT)
    for key, path, text in (
        ("crops", "Agricultural products", "The main agricultural products of {c} are {v}."),
        ("industries", "Industries", "The main industries of {c} are {v}."),
    ):
        found = items(writer.profile.text(_E, path) or "")
        if len(found) > 1:
            writer.say(key, (text,), v=join(found))
    writer.figures(_WORK)
    writer.figures(_STATE)


def trade(writer: Writer) -> None:
    """Exports and imports: worth, goods and partners."""
    writer.figures(_TRADE)
    for way, verb, noun in (("Exports", "exports", "export"), ("Imports", "imports", "import")):
        goods = writer.profile.text(_E, f"{way} - commodities") or ""
        named = items(goods, 5)
        if named:
            writer.say(
                f"{noun} goods", (f"The main {verb} of {{c}} were {{v}}{{y}}.",), v=join(named), y=year_phrase(goods)
            )
        partners = writer.profile.text(_E, f"{way} - partners") or ""
        found = shares(partners, 3)
        if not found or found[0].percent is None:
            continue
        first = mention(found[0].name)
        named = [f"{mention(share.name)} ({share.percent} percent)" for share in found]
        followed = f", followed by {join(named[1:])}" if len(named) > 1 else ""
        writer.say(
            f"{noun} partner",
            (f"The largest {noun} partner of {{c}} was {{v}}{{followed}}{{y}}.",),
            relation=f"{noun}_partner",
            answers=(first, found[0].name),
            v=named[0],
            followed=followed,
            y=year_phrase(partners),
        )
