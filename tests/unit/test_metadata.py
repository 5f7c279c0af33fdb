"""Metadata and its way through protobuf structs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from blockrag.errors import InvalidRequestError
from blockrag.metadata import MAX_EXACT, check_metadata, metadata_of, scalars, struct_of

NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=5)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
NUMBERS = st.integers(1 - MAX_EXACT, MAX_EXACT - 1) | st.floats(-1e9, 1e9).filter(lambda number: number % 1 > 0)
VALUES = st.recursive(
    st.none() | st.booleans() | TEXTS | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_metadata_comes_back_as_it_was(metadata: dict[str, Any]) -> None:
    assert metadata_of(struct_of(metadata)) == metadata


def test_whole_numbers_stay_whole() -> None:
    """Row C11: {"year": 2024} is 2024, not 2024.0."""
    back = metadata_of(struct_of({"year": 2024, "share": 0.5, "of": [1, {"n": 2}]}))
    assert repr(sorted(back.items())) == "[('of', [1, {'n': 2}]), ('share', 0.5), ('year', 2024)]"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_no_finite_number_is_refused_by_its_key(number: float, nested: bool) -> None:
    """Row B4: what pandas gives for an empty cell."""
    metadata: dict[str, Any] = {"ok": 1, "price": {"euro": [1.0, number]} if nested else number}
    struct = Struct()
    struct.update(metadata)
    for refuse in (lambda: check_metadata(metadata), lambda: struct_of(metadata), lambda: metadata_of(struct)):
        with pytest.raises(InvalidRequestError, match=r"'price\.euro'" if nested else "'price'") as refused:
            refuse()
        assert refused.value.field == "metadata"


@pytest.mark.parametrize("number", [1234567890123456789, -(2**53), 2.0**60])
def test_a_whole_number_that_may_be_rounded_is_refused(number: float) -> None:
    """Row A7: refused with "send it as text", also where a struct has rounded it already."""
    struct = Struct()
    struct.update({"ticket": number})
    for refuse in (lambda: struct_of({"ticket": number}), lambda: metadata_of(struct)):
        with pytest.raises(InvalidRequestError, match=r"'ticket' is too large.*send it as text"):
            refuse()


def test_other_values_are_named() -> None:
    deep: Any = 1
    for _ in range(20):
        deep = {"a": deep}
    with pytest.raises(InvalidRequestError, match="nested deeper"):
        check_metadata({"x": deep})
    with pytest.raises(InvalidRequestError, match="'when' is a object"):
        check_metadata({"when": object()})


def test_scalars_of_objects_within_have_joined_keys() -> None:
    """Row C10: author.name."""
    metadata = {"author": {"name": "Ann", "at": [{"city": "Rome"}, 7]}, "tags": ["x", True], "no": None}
    assert list(scalars(metadata)) == [
        ("author.name", "Ann"),
        ("author.at.city", "Rome"),
        ("author.at", 7.0),
        ("tags", "x"),
        ("tags", True),
    ]


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "x" * 129])
@pytest.mark.parametrize("nested", [False, True])
def test_a_name_is_one_line(name: str, nested: bool) -> None:
    metadata = {"outer": {name: 1}} if nested else {name: 1}
    with pytest.raises(InvalidRequestError, match="key"):
        check_metadata(metadata)
