"""Energy, transport and communications of a country."""

from __future__ import annotations

import re

from blockrag.corpus.almanac.lists import items, join
from blockrag.corpus.almanac.values import amount, percent
from blockrag.corpus.almanac.writing import Figure, Writer

_N = "Energy"
_T = "Transportation"
_C = "Communications"

_ENERGY = (
    Figure(
        "access",
        (_N, "Electricity access", "electrification - total population"),
        percent,
        ("In {c}, {v} of the people had access to electricity{y}.",),
    ),
    Figure(
        "capacity",
        (_N, "Electricity", "installed generating capacity"),
        amount,
        ("{c} had an electricity generating capacity of {v} kilowatts{y}.",),
        "kW",
        "capacity",
    ),
    Figure(
        "consumption",
        (_N, "Electricity", "consumption"),
        amount,
        ("{c} used {v} kilowatt-hours of electricity{y}.",),
        "kWh",
    ),
    Figure(
        "fossil",
        (_N, "Electricity generation sources", "fossil fuels"),
        percent,
        ("In {c}, fossil fuels provided {v} of the electricity{y}.",),
    ),
    Figure(
        "reactors",
        (_N, "Nuclear energy", "Number of operational nuclear reactors"),
        amount,
        ("{c} had {v} working nuclear reactor{pl}{y}.",),
    ),
    Figure(
        "oil produced",
        (_N, "Petroleum", "total petroleum production"),
        amount,
        ("{c} produced {v} barrels of petroleum per day{y}.",),
        "bbl/day",
    ),
)
_TRANSPORT = (
    Figure("airports", (_T, "Airports"), amount, ("{c} had {v} airport{pl}{y}.",), relation="airports"),
    Figure(
        "railways",
        (_T, "Railways", "total"),
        amount,
        ("The railway network of {c} {be} {v} kilometres long{y}.", "{c} had {v} kilometres of railways{y}."),
        "km",
        "railways",
    ),
)
_LINES = (
    Figure(
        "mobile",
        (_C, "Telephones - mobile cellular", "total subscriptions"),
        amount,
        ("{c} had {v} mobile telephone subscriptions{y}.",),
    ),
    Figure(
        "online",
        (_C, "Internet users", "percent of population"),
        percent,
        ("In {c}, {v} of the people used the internet{y}.",),
    ),
)


def energy(writer: Writer) -> None:
    """Electricity and fuels."""
    writer.figures(_ENERGY)


def transport(writer: Writer) -> None:
    """Airports, railways, ships and ports."""
    writer.figures(_TRANSPORT)
    ports = items(writer.profile.text(_T, "Ports", "key ports") or "", 4)
    if ports:
        noun = "ports of {c} include" if len(ports) > 1 else "port of {c} is"
        writer.say("key ports", (f"The main {noun} {{v}}.",), v=join(ports))


def communications(writer: Writer) -> None:
    """Telephones and the internet."""
    writer.figures(_LINES)
    code = re.match(r"\.[a-z]{2}\b", writer.profile.text(_C, "Internet country code") or "")
    if code:
        writer.say(
            "domain",
            ("The internet country code of {c} is {v}.",),
            relation="internet_code",
            answers=(code[0],),
            v=code[0],
        )
