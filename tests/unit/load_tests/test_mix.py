"""Questions are the same for the same seed, some articles hot and most cold."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.corpus.sample import Question
from load_tests.mix import MODES, Asked, Mix, parse_weights

QUESTIONS = tuple(
    Question(
        id=f"{article}-{number}", question=f"{article}? {number}", answers=("a",), article=f"a{article}", relation="r"
    )
    for article in range(50)
    for number in range(3)
)


def first(mix: Mix, count: int, user: int = 0) -> list[Asked]:
    return list(itertools.islice(mix.of_user(user), count))


@given(seed=st.integers(0, 2**32), user=st.integers(0, 100))
def test_the_same_seed_and_user_ask_the_same(seed: int, user: int) -> None:
    assert first(Mix(QUESTIONS, seed), 20, user) == first(Mix(QUESTIONS, seed), 20, user)


def test_users_and_seeds_ask_differently() -> None:
    mix = Mix(QUESTIONS, seed=1)

    assert first(mix, 20, 0) != first(mix, 20, 1)
    assert first(mix, 20) != first(Mix(QUESTIONS, seed=2), 20)


def test_all_users_have_the_same_hot_articles() -> None:
    mix = Mix(QUESTIONS, seed=3)
    hottest = mix.articles()[0]

    for user in range(3):
        counts = Counter(asked.article for asked in first(mix, 1000, user))
        assert counts.most_common(1)[0][0] == hottest


def test_articles_follow_zipf() -> None:
    mix = Mix(QUESTIONS, exponent=1.0)
    counts = Counter(asked.article for asked in first(mix, 20_000))
    ranked = mix.articles()
    harmonic = sum(1 / rank for rank in range(1, 51))

    for rank in (1, 2, 10, 50):
        assert counts[ranked[rank - 1]] / 20_000 == pytest.approx(1 / rank / harmonic, rel=0.25)


def test_exponent_zero_asks_about_all_alike() -> None:
    counts = Counter(asked.article for asked in first(Mix(QUESTIONS, exponent=0), 20_000))

    assert len(counts) == 50
    assert max(counts.values()) < 2 * min(counts.values())


def test_modes_follow_their_weights() -> None:
    counts = Counter(
        asked.mode for asked in first(Mix(QUESTIONS, mode_weights={"block": 3, "none": 1, "full": 0}), 4000)
    )

    assert counts["block"] / 4000 == pytest.approx(0.75, abs=0.05)
    assert counts["full"] == 0


def test_users_think_for_the_mean_time_and_never_for_long() -> None:
    times = [asked.think_s for asked in first(Mix(QUESTIONS, think_s=0.5), 4000)]

    assert sum(times) / 4000 == pytest.approx(0.5, rel=0.1)
    assert max(times) <= 2.5
    assert {asked.think_s for asked in first(Mix(QUESTIONS, think_s=0), 10)} == {0.0}


def test_weights_are_read() -> None:
    assert parse_weights("block=8, full=1,none=0.5") == {"block": 8, "full": 1, "none": 0.5}


@pytest.mark.parametrize(
    "text", ["", "paged=1", "block", "block=x", "block=-1", "block=0,full=0", "block=inf", "block=nan"]
)
def test_wrong_weights_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_weights(text)


@given(st.dictionaries(st.sampled_from(MODES), st.floats(0.01, 100), min_size=1))
def test_written_weights_are_read_back(weights: dict[str, float]) -> None:
    assert parse_weights(",".join(f"{mode}={weight}" for mode, weight in weights.items())) == weights
