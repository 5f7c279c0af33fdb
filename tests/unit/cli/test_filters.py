import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.cli.filters import parse_filters
from blockrag.errors import InvalidRequestError
from blockrag.results import Condition


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("region=Africa", Condition("region", "in", ("Africa",))),
        ("region = South Asia, Africa", Condition("region", "in", ("South Asia", "Africa"))),
        ("year>=1990", Condition("year", "at_least", (1990.0,))),
        ("year <= 2.5", Condition("year", "at_most", (2.5,))),
        ("kind!=draft", Condition("kind", "not_in", ("draft",))),
        ("public=true", Condition("public", "in", (True,))),
        ('code="7"', Condition("code", "in", ("7",))),
        ("code=7", Condition("code", "in", (7.0,))),
    ],
)
def test_forms(text: str, condition: Condition) -> None:
    assert parse_filters([text]) == (condition,)


@pytest.mark.parametrize("text", ["", "region", "=Africa", "year>=soon", "year<=true", "a<b", "a!b"])
def test_what_is_no_filter_is_named(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="filter"):
        parse_filters([text])


@given(st.text(max_size=30))
def test_any_text_is_a_filter_or_an_error(text: str) -> None:
    try:
        (condition,) = parse_filters([text])
    except InvalidRequestError:
        return
    assert condition.key.strip()
    assert condition.values
