"""The almanac evaluation against a hand-written oracle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict

import pytest

from blockrag.corpus.sample import Question
from blockrag.evaluation.almanac import evaluate_almanac, recalled
from blockrag.evaluation.scoring import bootstrap
from blockrag.results import AttentionModeName, Passage

CAPITAL = Question("almanac-001", "What is the capital of Fiji?", ("Suva",), "fiji", "capital")
AREA = Question("almanac-002", "What is the area of Fiji?", ("18,274 square kilometres", "18,274"), "fiji", "area")


def passage(document_id: str, text: str) -> Passage:
    return Passage("", document_id, "", 0, "", text, {}, 0.0)


class Oracle:
    """Knows the capital, half of the area, and nothing without passages."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.most_in_flight = 0

    async def __call__(self, question: str, mode: AttentionModeName) -> tuple[str, Sequence[Passage]]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)  # lets the others start
        try:
            if mode == "none":
                return "I do not know.", ()
            passages = (
                passage("tonga", "Suva is not in Tonga."),
                passage("fiji", "Suva is the capital of Fiji."),
            )
            return "the Suva." if "capital" in question else "18,274 miles", passages
        finally:
            self.in_flight -= 1


async def test_scores_per_mode() -> None:
    result = await evaluate_almanac([CAPITAL, AREA], Oracle(), modes=("block", "none"), resamples=200)
    block, none = result.modes
    assert block.recall is not None and block.recall.mean == 0.5
    assert block.exact_match.mean == 0.5
    assert block.f1.mean == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert block.by_relation == {"area": 0.0, "capital": 1.0}
    assert none.recall is None and none.exact_match.mean == 0.0
    assert block.questions == 2 and block.failed == 0 and result.failures == ()
    assert json.loads(json.dumps(asdict(result)))["modes"][0]["mode"] == "block"


async def test_a_failed_question_scores_zero_and_is_listed() -> None:
    async def failing(question: str, mode: AttentionModeName) -> tuple[str, Sequence[Passage]]:
        if "area" in question:
            raise TimeoutError("deadline exceeded")
        return "Suva", ()

    result = await evaluate_almanac([CAPITAL, AREA], failing, modes=("full",), resamples=100)
    (full,) = result.modes
    assert (full.questions, full.failed, full.exact_match.mean) == (1, 1, 0.5)
    assert [(failure.question, failure.error) for failure in result.failures] == [
        ("almanac-002", "TimeoutError: deadline exceeded")
    ]


async def test_progress_and_concurrency_are_bounded() -> None:
    oracle, seen = Oracle(), list[tuple[AttentionModeName, int]]()
    await evaluate_almanac(
        [CAPITAL] * 6,
        oracle,
        modes=("block",),
        concurrency=2,
        resamples=10,
        progress=lambda mode, done: seen.append((mode, done)),
    )
    assert seen == [("block", number) for number in range(1, 7)]
    assert oracle.most_in_flight == 2


async def test_bad_arguments_are_refused() -> None:
    for questions, concurrency in (([], 1), ([CAPITAL], 0)):
        with pytest.raises(ValueError, match="needs questions"):
            await evaluate_almanac(questions, Oracle(), concurrency=concurrency)


def test_recall_needs_document_rank_and_answer() -> None:
    right, other = passage("fiji", "The capital of Fiji is Suva."), passage("fiji", "Fiji has a coast.")
    assert recalled(CAPITAL, [*[other] * 4, right])
    assert not recalled(CAPITAL, [*[other] * 5, right])
    assert not recalled(CAPITAL, [passage("tonga", right.text)])


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0] * 20
    interval = bootstrap(values, seed=3)
    assert interval == bootstrap(values, seed=3)
    assert interval.low < interval.mean == 0.625 < interval.high
    assert interval.high - interval.low < 0.2
    assert bootstrap([1.0, 1.0]).low == 1.0
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
