"""The almanac evaluation: questions asked through retrieval, scored per attention mode.

Pure logic: whoever calls it says how a question is asked (`Ask`), so that it runs the same over gRPC and over a fake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from blockrag.corpus.sample import Question
from blockrag.evaluation.scoring import RESAMPLES, Interval, bootstrap, contains, exact_match, f1
from blockrag.results import AttentionModeName, Passage

MODES: tuple[AttentionModeName, ...] = ("block", "full", "none")
RECALL_AT = 5


Ask = Callable[[str, AttentionModeName], Awaitable[tuple[str, Sequence[Passage]]]]
"""Asks one question in a mode and gives the answer's text and the passages, best first; in ``none`` there are none."""


@dataclass(frozen=True)
class ModeScores:
    """Scores of one attention mode."""

    mode: AttentionModeName
    questions: int
    """How many were answered; the scores are over all questions, an unanswered one scores 0."""
    failed: int
    recall: Interval | None
    """Share of questions with a passage of the right article holding an answer among the first `RECALL_AT`; None
    in mode ``none``, which retrieves nothing."""
    exact_match: Interval
    f1: Interval
    by_relation: Mapping[str, float]
    """Exact match of each relation."""


@dataclass(frozen=True)
class Failure:
    """A question that was not answered, and why."""

    question: str
    mode: AttentionModeName
    error: str


@dataclass(frozen=True)
class AlmanacScores:
    """The evaluation's result."""

    questions: int
    recall_at: int
    seed: int
    resamples: int
    modes: tuple[ModeScores, ...]
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class _Outcome:
    relation: str
    recalled: bool
    exact: bool
    f1: float
    error: str | None = None


async def evaluate_almanac(
    questions: Sequence[Question],
    ask: Ask,
    *,
    modes: Sequence[AttentionModeName] = MODES,
    concurrency: int = 4,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[AttentionModeName, int], None] = lambda *_: None,
) -> AlmanacScores:
    """Ask all `questions` in each of `modes` and score the answers.

    An exception of `ask` counts as a wrong answer and is listed under `AlmanacScores.failures`; one bad answer out of
    hundreds must not lose the others.

    Args:
        concurrency: questions in flight at once; more than the decoder's slots only measures its queue.
        resamples: bootstrap samples of each interval.
        progress: called after each question with the mode and how many of it are done.

    Raises:
        ValueError: no questions, no modes, or a concurrency below 1.
    """
    if not questions or not modes or concurrency < 1:
        raise ValueError("the almanac evaluation needs questions, modes and a concurrency of at least 1")
    scores: list[ModeScores] = []
    failures: list[Failure] = []
    for mode in modes:
        outcomes = await _ask_all(questions, ask, mode, concurrency, progress)
        failures += [
            Failure(question.id, mode, outcome.error)
            for question, outcome in zip(questions, outcomes, strict=True)
            if outcome.error is not None
        ]
        scores.append(_score(mode, outcomes, seed, resamples))
    return AlmanacScores(len(questions), RECALL_AT, seed, resamples, tuple(scores), tuple(failures))


def recalled(question: Question, passages: Sequence[Passage]) -> bool:
    """Whether one of the first `RECALL_AT` passages is of the question's article and holds an answer."""
    return any(
        passage.document_id == question.article and contains(passage.text, question.answers)
        for passage in passages[:RECALL_AT]
    )


async def _ask_all(
    questions: Sequence[Question],
    ask: Ask,
    mode: AttentionModeName,
    concurrency: int,
    progress: Callable[[AttentionModeName, int], None],
) -> list[_Outcome]:
    slots = asyncio.Semaphore(concurrency)
    done = 0

    async def one(question: Question) -> _Outcome:
        nonlocal done
        async with slots:
            try:
                text, passages = await ask(question.question, mode)
            except Exception as error:
                outcome = _Outcome(question.relation, False, False, 0.0, f"{type(error).__name__}: {error}")
            else:
                outcome = _Outcome(
                    question.relation,
                    recalled(question, passages),
                    exact_match(text, question.answers),
                    f1(text, question.answers),
                )
        done += 1
        progress(mode, done)
        return outcome

    return list(await asyncio.gather(*(one(question) for question in questions)))


def _score(mode: AttentionModeName, outcomes: Sequence[_Outcome], seed: int, resamples: int) -> ModeScores:
    by_relation: dict[str, list[bool]] = {}
    for outcome in outcomes:
        by_relation.setdefault(outcome.relation, []).append(outcome.exact)
    failed = sum(outcome.error is not None for outcome in outcomes)
    return ModeScores(
        mode=mode,
        questions=len(outcomes) - failed,
        failed=failed,
        recall=None if mode == "none" else bootstrap([float(one.recalled) for one in outcomes], seed, resamples),
        exact_match=bootstrap([float(one.exact) for one in outcomes], seed, resamples),
        f1=bootstrap([one.f1 for one in outcomes], seed, resamples),
        by_relation={name: sum(exact) / len(exact) for name, exact in sorted(by_relation.items())},
    )
