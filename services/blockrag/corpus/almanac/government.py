"""Government and armed forces of a country."""

from __future__ import annotations

import re

from blockrag.corpus.almanac.lists import join, person, split, without_brackets
from blockrag.corpus.almanac.names import expand
from blockrag.corpus.almanac.people import demonym
from blockrag.corpus.almanac.values import percent, year_phrase
from blockrag.corpus.almanac.writing import Figure, Writer, indefinite

_G = "Government"
_M = "Military and Security"
_ORGANISATIONS = {
    "UN": "the United Nations",
    "EU": "the European Union",
    "NATO": "NATO",
    "AU": "the African Union",
    "ASEAN": "ASEAN",
    "LAS": "the Arab League",
    "OPEC": "OPEC",
    "OECD": "the OECD",
    "OAS": "the Organization of American States",
    "Caricom": "the Caribbean Community",
    "Mercosur": "Mercosur",
    "C": "the Commonwealth of Nations",
    "G-20": "the Group of 20",
    "BRICS": "BRICS",
    "WTO": "the World Trade Organization",
}
_LEFT = {"uk": {"EU"}}
"""Organisations that the source still lists for a country that has left."""

_POLITICIANS = ("President", "Prime Minister", "Chancellor", "Premier")
_ADOPTED = re.compile(
    r"\b(adopted|ratified|approved|promulgated|signed|proclaimed|effective|entered into force)\b[^,;]*?"
    r"(\d{1,2} [A-Z][a-z]+ \d{4})"
)
_FORCES = (
    Figure(
        "military spending",
        (_M, "Military expenditures"),
        percent,
        ("{c} spent {v} of its gross domestic product on its military{y}.",),
        "GDP",
        latest=True,
    ),
)


def government(writer: Writer) -> None:
    """Form of government, offices, parliament, law and memberships."""
    profile = writer.profile
    form = without_brackets(re.split(r"[;,]", profile.text(_G, "Government type") or "")[0])
    if form and form[0].islower() and len(form.split()) <= 7 and not form.startswith(("the ", "in ", "administered")):
        writer.say(
            "form",
            ("The government of {c} is {v}.",),
            relation="government",
            answers=(form,),
            v=indefinite(form),
        )
    _offices(writer)
    _parliament(writer)
    divisions = profile.text(_G, "Administrative divisions") or ""
    if match := re.match(r"([2-9]|\d\d+) ([a-z][a-z -]+?)(?= \(|;|$)", divisions):
        writer.say("divisions", ("{c} {is} divided into {v}.",), v=match[0])
    history = re.split(r"\b(?:latest|newest|current)\b", profile.text(_G, "Constitution", "history") or "")[-1]
    if match := _ADOPTED.search(history):
        verb = {"effective": "took effect", "entered into force": "took effect"}.get(match[1], f"was {match[1]}")
        writer.say(
            "constitution",
            ("The constitution of {c} {verb} on {v}.",),
            relation="constitution" if verb == "was adopted" else None,
            answers=(match[2], match[2].split()[-1]),
            verb=verb,
            v=match[2],
        )
    age = re.match(r"(\d\d) years of age", profile.text(_G, "Suffrage") or "")
    if age:
        writer.say("vote", ("The voting age in {c} is {v} years.",), relation="voting_age", answers=(age[1],), v=age[1])
    member = set(split(profile.text(_G, "International organization participation") or "", ","))
    member -= _LEFT.get(profile.country.code, set())
    joined = [name for short, name in _ORGANISATIONS.items() if short in member]
    if len(joined) > 1:
        writer.say("member", ("{c} {is} a member of {v}.",), v=join(joined[:5]))


def military(writer: Writer) -> None:
    """Armed forces, their size and cost; the space agency."""
    profile = writer.profile
    forces = expand(without_brackets(re.split(r"[:;(]", profile.text(_M, "Military and security forces") or "")[0]))
    if (
        re.search(r"\b(?:Forces?|Army|Military|Guard|Police)\b", forces)
        and len(forces.split()) <= 8
        and forces[0].isupper()
    ):
        writer.say("forces", ("The security forces of {c} include the {v}.",), v=forces.removeprefix("The "))
    strength = profile.text(_M, "Military and security service personnel strengths") or ""
    if match := re.match(
        r"(?:approximately|estimated|about) (\d[\d,]*(?: million)?) (?:active|total active)", strength
    ):
        writer.say(
            "strength",
            ("The military of {c} had about {v} active personnel{y}.",),
            v=match[1],
            y=year_phrase(strength),
        )
    writer.figures(_FORCES)
    agency = re.match(
        r"([A-Z][^(;:]+?) \((?:[A-Z][\w/-]*[;,] )?(?:established|founded|created|formed)(?: in)? (\d{4})",
        profile.text("Space", "Space agency/agencies") or "",
    )
    if agency:
        writer.say(
            "space",
            (
                "The space agency of {c} is the {v}, which was founded in {d}.",
                "The {v} is the space agency of {c} and was established in {d}.",
            ),
            relation="founded",
            about=f"the {agency[1]}",
            answers=(agency[2],),
            v=agency[1],
            d=agency[2],
        )


def _offices(writer: Writer) -> None:
    profile = writer.profile
    adjective = demonym(writer)
    sovereign = profile.text(_G, "Dependency status") is None
    seen: set[str] = set()
    named = False
    for office in ("chief of state", "head of government"):
        holder = person(profile.text(_G, "Executive branch", office) or "")
        if holder is None or holder.name in seen:
            continue
        seen.add(holder.name)
        writer.say(
            office,
            ("The {office} of {c} is {title} {v}, in office since {d}.",),
            relation=office.replace(" ", "_"),
            answers=(holder.name, f"{holder.title} {holder.name}"),
            office=office,
            title=holder.title,
            v=holder.name,
            d=holder.since,
        )
        if adjective and sovereign and holder.title in _POLITICIANS and not named:
            named = True
            writer.say(
                f"{office} person",
                ("{v} is {kind} politician and the {title} of {c}.",),
                relation="nationality",
                about=holder.name,
                answers=(adjective,),
                v=holder.name,
                kind=indefinite(adjective),
                title=holder.title.lower(),
            )


def _parliament(writer: Writer) -> None:
    profile = writer.profile
    name = without_brackets(profile.text(_G, "Legislative branch", "legislature name") or "")
    structure = profile.text(_G, "Legislative branch", "legislative structure") or ""
    if name and name[0].isupper() and len(name.split()) <= 8 and not re.search(r"[;/,\"]", name):
        name = re.sub(r"^The ", "", name)
        kind = f", which is {structure}" if structure in ("unicameral", "bicameral") else ""
        writer.say(
            "parliament",
            ("The legislature of {c} is the {v}{kind}.",),
            relation="legislature",
            answers=(name,),
            v=name,
            kind=kind,
        )
    for key, branch in (("seats", "Legislative branch"), ("lower", "Legislative branch - lower chamber")):
        chamber = without_brackets(profile.text(_G, branch, "chamber name") or "").removeprefix("The ") or (
            "parliament" if key == "seats" else ""
        )
        seats = re.match(r"\d+", profile.text(_G, branch, "number of seats") or "")
        if not chamber or re.search(r"[;/\"]", chamber):
            continue
        if seats:
            writer.say(f"{key} seats", ("The {v} of {c} has {n} seats.",), v=chamber, n=seats[0])
