"""Value parsers of the almanac: examples from the source, then properties on any text."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.corpus.almanac.values import amount, clean, magnitude, money, percent, present, whole, year_phrase

SCALES = st.sampled_from(["", " thousand", " million", " billion", " trillion"])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("<p>parliamentary democracy&nbsp;under a monarchy</p>", "parliamentary democracy under a monarchy"),
        ("a lake - 540 sq km<br><br><strong>note:</strong> [s] is the source", "a lake - 540 sq km"),
        ("Aoraki 3,724 m; note - it was higher", "Aoraki 3,724 m"),
        ("Bras&iacute;lia", "Brasília"),
        ("Mt. Fogo and St. George", "Mount Fogo and Saint George"),
        ("&ldquo;Hymn&rdquo;", '"Hymn"'),
        ("deforestation; <br>drought", "deforestation; drought"),
    ],
)
def test_clean_keeps_only_text(raw: str, expected: str) -> None:
    assert clean(raw) == expected


@pytest.mark.parametrize("raw", ["NA", "N/A", "none", "none (overseas territory of the UK)", "NA%", "", "<br>", "--"])
def test_missing_values_are_none(raw: str) -> None:
    assert present(raw) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9,174,390 (2025 est.)", " in 2025"),
        ("652,271 (July 2020 est.)", " in 2020"),
        ("0.68% (2020-25 est.)", " between 2020 and 2025"),
        ("103 kt (2022-2024 est.)", " between 2022 and 2024"),
        ("98 (FY 2019/20)", " between 2019 and 2020"),
        ("12 km (1.435-m gauge)", ""),
        ("443 sq km (Antigua 280 sq km)", ""),
    ],
)
def test_year_phrases(text: str, expected: str) -> None:
    assert year_phrase(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("147,200 (2024 est.)", "147,200"),
        ("4.534 million (2024 est.)", "4.534 million"),
        ("approximately 15,500 on the bases", "15,500"),
        ("arable land: 16% (2023 est.)", "16"),
        ("-0.35% (2025 est.)", "-0.35"),
        ("293564.20 km", "293,564.2"),
        ("80-85%", None),
        ("16th century", None),
        ("no data", None),
    ],
)
def test_amounts(text: str, expected: str | None) -> None:
    assert amount(text) == expected


def test_units_are_part_of_the_value() -> None:
    assert percent("31.5% (2023 est.)") == "31.5 percent"
    assert percent("31.5 (2023 est.)") is None
    assert money("$581.131 billion (2024 est.)") == "$581.131 billion"
    assert money("-$243.473 million (2023 est.)") is None
    assert money("12 million") is None
    assert whole("1.284 million sq km") == "1,284,000"


@given(st.text())
def test_clean_is_idempotent_and_plain(raw: str) -> None:
    text = clean(raw)
    assert clean(text) == text or "&" in text or "<" in text
    assert "  " not in text and ">" not in text and "\n" not in text
    assert text == text.strip()


@given(st.text())
def test_parsers_take_any_text(raw: str) -> None:
    text = clean(raw)
    for parse in (amount, percent, money, whole, present):
        value = parse(text)
        assert value is None or isinstance(value, str)
    assert re.fullmatch(r"|( in \d{4}| between \d{4} and \d{4})", year_phrase(text))


@given(st.decimals(min_value=0, max_value=10**9, places=3), SCALES)
def test_amount_loses_nothing(value: Decimal, scale: str) -> None:
    text = f"{value:,f}{scale} (2024 est.)"
    written = amount(text)
    assert written is not None
    assert magnitude(written) == magnitude(text)
    assert Decimal(written.split()[0].replace(",", "")) == value
    assert written.endswith(scale)


@given(st.integers(min_value=0, max_value=10**12))
def test_whole_groups_by_thousands(value: int) -> None:
    assert whole(f"{value:,} sq km") == f"{value:,}"
