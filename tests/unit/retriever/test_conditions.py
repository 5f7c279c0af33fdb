"""Filters on metadata: parsing and the derived fields."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from blockrag.characters import normalise
from blockrag.errors import InvalidRequestError
from blockrag.retriever.payload import (
    AnyTerm,
    NumberRange,
    metadata_numbers,
    metadata_terms,
    number_field,
    parse_conditions,
)
from blockrag.v1 import common_pb2 as pb

IN, NOT_IN = pb.CONDITION_OPERATOR_IN, pb.CONDITION_OPERATOR_NOT_IN
AT_LEAST, AT_MOST = pb.CONDITION_OPERATOR_AT_LEAST, pb.CONDITION_OPERATOR_AT_MOST


def value(content: Any) -> Value:
    if isinstance(content, Value):
        return content
    if isinstance(content, bool):
        return Value(bool_value=content)
    if isinstance(content, str):
        return Value(string_value=content)
    return Value(number_value=content)


def condition(key: str, operator: int, *values: Any) -> pb.MetadataCondition:
    return pb.MetadataCondition(key=key, operator=operator, values=[value(content) for content in values])  # type: ignore[arg-type]


def test_conditions() -> None:
    parsed = parse_conditions(
        [condition("lang", IN, "en", "de", "en"), condition("year", AT_LEAST, 2000), condition("draft", NOT_IN, True)]
    )

    assert parsed == (
        AnyTerm(('["lang", "en"]', '["lang", "de"]')),
        NumberRange(number_field("year"), at_least=2000.0),
        AnyTerm(('["draft", true]',), negated=True),
    )


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (condition("", IN, "x"), r"key: must not be empty"),
        (condition("k", IN), "must hold 1 to 256"),
        (condition("k", AT_LEAST), "must be one number"),
        (condition("k", pb.CONDITION_OPERATOR_UNSPECIFIED, "x"), "operator"),
        (condition("k", 99, "x"), "operator"),
        (condition("k", AT_LEAST, "2000"), "must be one number"),
        (condition("k", AT_MOST, True), "must be one number"),
        (condition("k", AT_MOST, 1, 2), "must be one number"),
        (condition("k", AT_MOST, float("nan")), "finite"),
        (condition("k", IN, 1234567890123456788), "send it as text"),
        (condition("k", IN, Value(null_value=0)), "strings, numbers or booleans"),  # type: ignore[arg-type]
        (condition("k", IN, Value(struct_value=Struct())), "strings, numbers or booleans"),
        (condition("k", NOT_IN, Value(list_value=ListValue())), "strings, numbers or booleans"),
        (condition("k", IN, Value()), "strings, numbers or booleans"),
        (condition("k", IN, *range(257)), "must hold 1 to 256"),
    ],
)
def test_malformed_conditions(message: pb.MetadataCondition, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        parse_conditions([condition("fine", IN, 1), message])
    assert caught.value.field.startswith("filter[1].")


def test_too_many_conditions() -> None:
    with pytest.raises(InvalidRequestError, match="at most 32"):
        parse_conditions([condition("k", IN, 1)] * 33)


def test_derived_fields() -> None:
    metadata = {"lang": "en", "year": 2001, "tags": ["x", 2, True], "draft": False, "none": None, "deep": {"a": 1}}

    assert metadata_terms(metadata) == [
        '["deep.a", 1.0]',
        '["draft", false]',
        '["lang", "en"]',
        '["tags", "x"]',
        '["tags", 2.0]',
        '["tags", true]',
        '["year", 2001.0]',
    ]
    assert metadata_numbers(metadata) == {
        number_field("year"): [2001.0],
        number_field("tags"): [2.0],
        number_field("deep.a"): [1.0],
    }


texts = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff")).map(normalise)
scalars = st.one_of(texts, st.booleans(), st.floats(-(2.0**52), 2.0**52), st.integers(-999, 999))


@given(texts.filter(lambda text: 0 < len(text) <= 128), scalars, scalars)
def test_a_value_has_the_term_of_an_equal_value_only(key: str, stored: Any, wanted: Any) -> None:
    def kind(content: Any) -> type:
        return type(content) if isinstance(content, bool | str) else float

    (parsed,) = parse_conditions([condition(key, IN, wanted)])
    assert isinstance(parsed, AnyTerm)
    equal = (
        kind(stored) is kind(wanted) and stored == wanted and str(float(stored)) == str(float(wanted))
        if not (isinstance(stored, str) or isinstance(wanted, str))
        else stored == wanted
    )

    assert (parsed.terms[0] in metadata_terms({key: stored})) == equal
