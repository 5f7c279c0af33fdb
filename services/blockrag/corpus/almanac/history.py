"""History and symbols of a country: independence, national day, symbols, anthem, heritage."""

from __future__ import annotations

import re

from blockrag.corpus.almanac.lists import first_date, items, join, ordinary_name, without_brackets
from blockrag.corpus.almanac.names import expand
from blockrag.corpus.almanac.writing import Writer

_G = "Government"
_FOUNDED = re.compile(r"\b(?:found|establish|unif|unit|proclaim|formed|federation)")


def history(writer: Writer) -> None:
    """Independence, national day, symbols, anthem, heritage."""
    profile = writer.profile
    _independence(writer)
    day = re.match(
        r"([^,;(\"]+?)(?: \([^)]*\))?, (\d{1,2} [A-Z][a-z]+)(?: \(((?:A\.D\. )?\d{3,4})\))?",
        profile.text(_G, "National holiday") or "",
    )
    if day:
        writer.say(
            "holiday",
            (
                "The national holiday of {c} is {v}, celebrated on {d}.",
                "{c} celebrate{s} its national holiday, {v}, on {d}.",
            ),
            relation="national_holiday",
            answers=(day[2],),
            v=expand(day[1]),
            d=day[2],
        )
    for key, path, one, many in (
        (
            "symbol",
            "National symbol(s)",
            "The national symbol of {c} is the {v}.",
            "The national symbols of {c} are {v}.",
        ),
        ("colour", "National color(s)", "The national colour of {c} is {v}.", "The national colours of {c} are {v}."),
    ):
        found = items(profile.text(_G, path) or "", 5)
        if len(found) == 1 and re.match(r"(?:a|an|the|three|two|ten) ", found[0]):
            found = []
        if found:
            asked = "national_symbol" if key == "symbol" and len(found) == 1 else None
            writer.say(key, (many if len(found) > 1 else one,), relation=asked, answers=found[:1], v=join(found))
    _anthem(writer)
    sites = re.match(r"[1-9]\d*", profile.text(_G, "National heritage", "total World Heritage Sites") or "")
    if sites:
        noun = "World Heritage Site" if sites[0] == "1" else "World Heritage Sites"
        writer.say("heritage", ("{c} {has} {v}.",), relation="heritage", answers=(sites[0],), v=f"{sites[0]} {noun}")


def _independence(writer: Writer) -> None:
    source = (writer.profile.text(_G, "Independence") or "").split(";")[0]
    date = first_date(source)
    if date is None or not source.startswith(date) or not re.search(r"\d{3,4}$", date):
        return
    reason = source[len(date) :].strip(" ()")
    answers = (date, date.split()[-1])
    if match := re.match(r"(?:declared independence )?from ([^;:,()]+)$", reason):
        former = re.sub(r" (?:protectorate|colonial) status$", "", match[1])
        if re.match(r"(?:UN|[A-Z]\w+-administered|League)", former):
            former = f"a {former}"
        writer.say(
            "independence",
            ("{c} became independent from {f} on {v}.", "{c} gained its independence from {f} on {v}."),
            relation="independence",
            answers=answers,
            f=expand(former),
            v=date,
        )
    elif not reason:
        writer.say(
            "independence", ("{c} became independent on {v}.",), relation="independence", answers=answers, v=date
        )
    elif _FOUNDED.search(reason):
        writer.say(
            "independence",
            ("The state of {c} was established on {v}.", "The state of {c} was founded on {v}."),
            relation="founded",
            about=f"the state of {writer.profile.country.ref}",
            answers=answers,
            v=date,
        )


def _anthem(writer: Writer) -> None:
    match = re.match(r"\"([^\"]+)\"(?: \(([^()]+)\))?", writer.profile.text(_G, "National anthem(s)", "title") or "")
    if match is None or "National Anthem" in match[1]:
        return
    # A mark that ends a sentence inside the title would end the passage's sentence too.
    title, meaning = (re.sub(r"[!?.\"]", "", part or "").strip(" ,") for part in match.groups())
    named = f"{title} ({meaning})" if meaning else title
    lyrics = (writer.profile.text(_G, "National anthem(s)", "lyrics/music") or "").partition("/")[0]
    people = [name for name in re.split(r",| and ", without_brackets(lyrics)) if re.search(r"[A-Z]{2}", name)]
    authors = [ordinary_name(name) for name in people]
    if re.search(r"\b(?:or|none|unknown|various|collective|no lyrics)\b", lyrics):
        authors = []
    templates = (
        ("The national anthem of {c} is {v}, written by {p}.",) if authors else ("The national anthem of {c} is {v}.",)
    )
    values = {"v": named, "p": join(authors) if authors else ""}
    writer.say("anthem", templates, relation="anthem", answers=(title, named), **values)
    if authors:
        writer.say("anthem", templates, relation="written", about=title, answers=(join(authors), *authors), **values)
