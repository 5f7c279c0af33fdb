import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.compressor.planning import PromptBudget, expand_what_fits
from blockrag.errors import PromptTooLongError


@given(st.lists(st.integers(min_value=1, max_value=300), max_size=30), st.integers(min_value=0, max_value=2000))
def test_what_is_expanded_fits_and_what_is_dropped_did_not(tokens: list[int], budget: int) -> None:
    decisions = expand_what_fits(tokens, budget)
    used = 0
    for needed, decision in zip(tokens, decisions, strict=True):
        assert decision.in_prompt == (needed <= budget - used)
        assert decision.in_prompt == (decision.dropped_reason == "")
        used += needed if decision.in_prompt else 0
    assert used <= budget


def test_a_dropped_passage_says_what_it_needed() -> None:
    assert expand_what_fits([100, 60, 20], 125)[1].dropped_reason == "over the token budget: needs 60, 25 of 125 left"


def test_the_request_may_lower_the_budget_but_not_raise_it() -> None:
    def budget(max_context_tokens: int) -> int:
        return PromptBudget(1000, 1, 50, 49, max_context_tokens).passage_tokens()

    assert budget(0) == 900
    assert budget(300) == 300
    assert budget(5000) == 900


def test_a_question_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PromptTooLongError, match="shorten the question or lower max_tokens"):
        PromptBudget(100, 1, 80, 20).passage_tokens()
