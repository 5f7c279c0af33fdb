import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.cli.ask import parse_filters
from blockrag.errors import InvalidRequestError
from blockrag.results import Condition


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("region=Africa", Condition("region", "in", ("Africa",))),
        ("region = South Asia, Africa", Condition("region", "in", ("South Asia", "Africa"))),
        ("year>=1990", Condition("year", "at_least", (1990,))),
        ("year <= 2.5", Condition("year", "at_most", (2.5,))),
        ("kind!=draft", Condition("kind", "not_in", ("draft",))),
        ("public=true", Condition("public", "in", (True, "true"))),
        ('code="7"', Condition("code", "in", ("7",))),
        ("code=7", Condition("code", "in", (7, "7"))),
        ('city="Paris, France"', Condition("city", "in", ("Paris, France",))),
        ('city!="Paris, France", Rome', Condition("city", "not_in", ("Paris, France", "Rome"))),
        (r'said="\"no\", he wrote"', Condition("said", "in", ('"no", he wrote',))),
        ('width=3" pipe', Condition("width", "in", ('3" pipe',))),
        ("zip=01234", Condition("zip", "in", ("01234",))),
        ("author.name=Ann", Condition("author.name", "in", ("Ann",))),
        ("ticket=1234567890123456788", Condition("ticket", "in", ("1234567890123456788",))),
        ("x=nan,inf,1_000", Condition("x", "in", ("nan", "inf", "1_000"))),
        ("x=1e3,-2.50", Condition("x", "in", (1000.0, "1e3", -2.5, "-2.50"))),
    ],
)
def test_forms(text: str, condition: Condition) -> None:
    """Rows A7 and C10: quoted text is one value, leading zeros are text, what no number can hold is text."""
    assert parse_filters([text]) == (condition,)


@pytest.mark.parametrize(
    "text", ["", "region", "=Africa", "year>=soon", "year>=nan", "year<=true", "a<b", "a!b", 'a="x', 'a=b,"c']
)
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
