"""Parsers of lists: shares, neighbours, capitals, persons, dates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.corpus.almanac.currencies import currency
from blockrag.corpus.almanac.lists import (
    Person,
    Share,
    capitals,
    clauses,
    elevation,
    first_date,
    items,
    join,
    lengths,
    official_languages,
    ordinary_name,
    person,
    shares,
    split,
    without_brackets,
)
from blockrag.corpus.almanac.values import clean

ANY = st.text(alphabet=st.sampled_from("aAbC éXV.,;:()[]%0123456789-/ *'\""), max_size=80)


def test_joining() -> None:
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert join(["a", "b and c", "d"]) == "a, b and c, and d"


def test_splitting_leaves_brackets_and_numbers_whole() -> None:
    assert split("Umbundu (a, b) 23%, 1,000 Kikongo; Chokwe") == ["Umbundu (a, b) 23%", "1,000 Kikongo", "Chokwe"]
    assert without_brackets("Peak (on (this) island) 3 m (cut") == "Peak 3 m"


def test_shares_leave_out_the_rest() -> None:
    text = "German (official nationwide) 88.6%, Turkish 2.3%, other (includes Slovene) 5.3%, unspecified 1% (2001 est.)"
    assert shares(text) == [Share("German", "88.6"), Share("Turkish", "2.3")]
    assert str(shares("Islam 4%")[0]) == "Islam (4 percent)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("German (official nationwide) 88.6%, Croatian (official in Burgenland) 1.6%", ["German"]),
        ("Russian 71.4% (official), Belarusian (official) 26%", ["Russian", "Belarusian"]),
        ("Fang, other (includes Portuguese (official), French (official))", ["Portuguese", "French"]),
        ("Korean, English", []),
    ],
)
def test_official_languages(text: str, expected: list[str]) -> None:
    assert official_languages(text) == expected


def test_neighbours() -> None:
    assert lengths("Greece 212 km; US 3,155 km (includes Alaska); US Naval Base 28.5 km") == [
        ("Greece", "212"),
        ("US", "3,155"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Vienna", [("Vienna", "")]),
        ("Suva (on Viti Levu)", [("Suva", "")]),
        ("Washington, D.C.", [("Washington, D.C.", "")]),
        ("Chisinau in Romanian (Kishinev in Russian)", [("Chisinau", "")]),
        ("no official capital; government offices in Yaren", []),
        (
            "Gitega (political capital), Bujumbura (commercial capital)",
            [("Gitega", "political"), ("Bujumbura", "commercial")],
        ),
        ("Rangoon (aka Yangon); Nay Pyi Taw is the administrative capital", [("Rangoon", "")]),
    ],
)
def test_capitals(text: str, expected: list[tuple[str, str]]) -> None:
    assert capitals(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Grossglockner 3,798 m", ("Grossglockner", "3,798")),
        ("Mount Everest (highest peak in Asia) 8,849 m", ("Mount Everest", "8,849")),
        ("Mont Blanc 4,810", ("Mont Blanc", "4,810")),
        ("Dead Sea -431 m", ("Dead Sea", "-431")),
        ("unnamed location 5 m", None),
        ("sea level", None),
    ],
)
def test_elevations(text: str, expected: tuple[str, str] | None) -> None:
    assert elevation(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Alexander VAN DER BELLEN", "Alexander Van der Bellen"),
        ("Donald J. TRUMP", "Donald Trump"),
        ("CHARLES III", "Charles III"),
        ("Abdel Fattah EL-SISI", "Abdel Fattah El-Sisi"),
        ("Sean O'NEILL", "Sean O'Neill"),
        ("LEE Jae-myung", "Lee Jae-myung"),
    ],
)
def test_names_in_ordinary_letters(text: str, expected: str) -> None:
    assert ordinary_name(text) == expected


def test_persons() -> None:
    king = "King CHARLES III (since 8 September 2022); represented by Governor General Rodney WILLIAMS"
    assert person(king) == Person("King", "Charles III", "8 September 2022")
    assert person("vacant (since 1 May 2020)") is None
    assert person("President Kais SAIED") is None


def test_dates() -> None:
    assert first_date("5 July 1962 (from France)") == "5 July 1962"
    assert first_date("14-15 May 1811 (from Spain)") == "14-15 May 1811"
    assert first_date("1492") is None


def test_items_and_clauses_leave_out_sentences() -> None:
    assert items("oil, coal (hard), 500 mines, and salt, note") == ["oil", "coal", "salt"]
    assert clauses("floods and landslides are common; earthquakes; flooding, as well as fire; typhoons", 5) == [
        "earthquakes",
        "typhoons",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Algerian dinars (DZD) per US dollar -", ("Algerian dinar", "DZD")),
        ("Danish kroner (DKK) per US dollar -", ("Danish krone", "DKK")),
        ("Communaute Financiere Africaine francs (XOF) per US dollar -", ("West African CFA franc", "XOF")),
        ("the US dollar is used", ("United States dollar", "USD")),
        ("see entry for the West Bank", None),
    ],
)
def test_currencies(text: str, expected: tuple[str, str] | None) -> None:
    assert currency(text) == expected


@given(ANY)
def test_any_text_gives_clean_items(raw: str) -> None:
    text = clean(raw)
    for item in [*items(text), *clauses(text, 5), *(share.name for share in shares(text))]:
        assert item == item.strip() and item
        assert not set(item) & set("()[]%;")
    for parse in (capitals, elevation, person, lengths, official_languages, ordinary_name, currency):
        parse(text)  # type: ignore[operator]


@given(
    st.lists(
        st.tuples(st.from_regex(r"[A-Z][a-z]{2,9}", fullmatch=True), st.integers(1, 99)),
        max_size=4,
        unique_by=lambda p: p[0],
    )
)
def test_shares_round_trip(pairs: list[tuple[str, int]]) -> None:
    kept = [
        (name, value)
        for name, value in pairs
        if not name.lower().startswith(("other", "none", "unspecified", "unknown"))
    ]
    text = ", ".join(f"{name} {value}%" for name, value in kept) + " (2020 est.)"
    assert shares(text) == [Share(name, str(value)) for name, value in kept]
