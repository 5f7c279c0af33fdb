from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.sequence import Sampler, SamplingParams, sample
from blockrag.errors import DataError, InvalidRequestError

_LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def _sampler(**fields: float) -> Sampler:
    return Sampler(SamplingParams(max_tokens=8, **fields))  # type: ignore[arg-type]


def test_greedy_takes_the_likeliest() -> None:
    assert sample(torch.stack([_LOGITS, -_LOGITS]), [_sampler(), _sampler()]) == [1, 3]


def test_frequencies_follow_the_distribution() -> None:
    sampler = _sampler(temperature=2.0, seed=1)
    counts = Counter(sampler.draw(_LOGITS) for _ in range(4000))
    expected = torch.softmax(_LOGITS / 2.0, dim=-1)
    for token in range(4):
        assert counts[token] / 4000 == pytest.approx(expected[token].item(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_temperature_near_0_takes_the_likeliest(temperature: float, top_p: float) -> None:
    logits = torch.tensor([-3.0, 10.0, 2.0, -torch.inf])
    sampler = _sampler(temperature=temperature, top_p=top_p)
    assert {sampler.draw(logits) for _ in range(20)} == {1}


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    half, more = _sampler(temperature=1.0, top_p=0.4, seed=3), _sampler(temperature=1.0, top_p=0.7, seed=3)
    assert {half.draw(logits) for _ in range(200)} == {1}
    assert {more.draw(logits) for _ in range(200)} == {1, 2}


@given(
    seed=st.integers(0, 2**64 - 1),
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    temperature=st.floats(0.01, 10),
    top_p=st.floats(0.001, 1.0),
)
def test_a_draw_is_a_token_and_repeats_with_its_seed(
    seed: int, logits: list[float], temperature: float, top_p: float
) -> None:
    row = torch.tensor(logits)
    params = SamplingParams(max_tokens=4, temperature=temperature, top_p=top_p, seed=seed)
    first, second = Sampler(params), Sampler(params)
    drawn = [first.draw(row) for _ in range(4)]
    assert all(0 <= token < len(logits) for token in drawn)
    assert drawn == [second.draw(row) for _ in range(4)]


def test_draws_do_not_depend_on_the_rest_of_the_batch() -> None:
    alone = _sampler(temperature=1.0, seed=7)
    expected = [sample(_LOGITS[None], [alone])[0] for _ in range(20)]
    among, other = _sampler(temperature=1.0, seed=7), _sampler(temperature=3.0, seed=8)
    batch = torch.stack([torch.ones(4), _LOGITS, _LOGITS])
    assert [sample(batch, [other, among, _sampler()])[1] for _ in range(20)] == expected


def test_logits_that_are_not_finite_fail_their_row_only() -> None:
    bad = torch.tensor([0.0, float("nan"), 1.0, 2.0])
    infinite = torch.tensor([0.0, float("inf"), 1.0, 2.0])
    tokens = sample(torch.stack([bad, _LOGITS, infinite]), [_sampler(temperature=1.0), _sampler(), _sampler()])
    assert isinstance(tokens[0], DataError)
    assert tokens[1] == 1
    assert isinstance(tokens[2], DataError)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": 11.0}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("top_p", {"top_p": float("nan")}),
        ("seed", {"seed": -1}),
        ("stop", {"stop": ("x", "")}),
    ],
)
def test_a_value_out_of_range_is_named(field: str, values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{"max_tokens": 1, **values})  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{field}"
