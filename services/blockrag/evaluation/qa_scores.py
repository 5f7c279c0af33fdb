"""From answers to scores: means with intervals, paired differences, refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.evaluation.answering import Mode
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.intervals import Interval, bootstrap, bootstrap_difference, bootstrap_ratio
from blockrag.evaluation.metrics import contains, exact_match, f1
from blockrag.evaluation.qa import NO_PASSAGES, Cell, Condition, QaPlan, System

METRICS = ("exact_match", "f1", "contained")


@dataclass(frozen=True)
class Score:
    """Scores of one cell whose condition can be answered."""

    system: str
    mode: Mode
    condition: str
    passages: int
    place: int | None
    """Index of the gold passage; None: drawn."""
    exact_match: Interval
    f1: Interval
    contained: Interval
    refused: Interval
    """Share of questions refused: all of them wrongly, but without passages."""


@dataclass(frozen=True)
class RefusalScore:
    """Refusals over the same questions with and without the gold passage, one of each per question.

    Questions whose gold piece does not hold an answer word for word are left out: other passages may answer them as
    well as it does.
    """

    system: str
    mode: Mode
    questions: int
    precision: Interval | None
    """Of the questions refused, the share that had no gold passage; None where none was refused."""
    recall: Interval
    """Of the questions without gold passage, the share refused."""
    wrong: Interval
    """Of the questions with gold passage, the share refused."""


@dataclass(frozen=True)
class Difference:
    """Paired difference of two cells' means on the same questions: first minus second."""

    first: str
    second: str
    condition: str
    exact_match: Interval
    f1: Interval
    contained: Interval


@dataclass(frozen=True)
class QaScores:
    """What a run found."""

    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    refusals: tuple[RefusalScore, ...]
    by_group: Mapping[str, Mapping[str, float]]
    """Number of questions ("questions") and exact match per "system, mode" of each group, in the main condition."""


def score_answers(
    questions: Sequence[DrawnQuestion],
    systems: Sequence[System],
    plan: QaPlan,
    answers: Mapping[Cell, Sequence[str]],
    seed: int = 0,
) -> QaScores:
    """Score what ``evaluate_qa`` returned; ``seed`` draws the bootstrap's resamples."""
    refused = {
        cell: np.array([system.reader.is_refusal(answer) for answer in answers[cell]], dtype=np.float64)
        for system in systems
        for cell in answers
        if cell.system == system.label
    }
    values = {
        cell: _values(questions, outputs)
        for cell, outputs in answers.items()
        if cell.condition.gold or cell.condition == NO_PASSAGES
    }
    scores = tuple(
        Score(
            system=cell.system,
            mode=cell.mode,
            condition=cell.condition.label,
            passages=cell.condition.passages,
            place=cell.condition.place,
            refused=bootstrap(refused[cell], seed),
            **{metric: bootstrap(column, seed) for metric, column in columns.items()},
        )
        for cell, columns in values.items()
    )
    differences = tuple(
        Difference(
            first=cell_label(first),
            second=cell_label(second),
            condition=first.condition.label,
            **{metric: bootstrap_difference(values[first][metric], values[second][metric], seed) for metric in METRICS},
        )
        for first, second in _pairs(systems, plan, values)
    )
    refusals = tuple(_refusals(questions, refused, plan, seed)) if plan.absent else ()
    return QaScores(scores, differences, refusals, _by_group(questions, plan, values))


def cell_label(cell: Cell) -> str:
    """A cell's name in tables, its condition left out."""
    return f"{cell.system}, {cell.mode}"


def _values(questions: Sequence[DrawnQuestion], outputs: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    pairs = [(output, question.source.answers) for output, question in zip(outputs, questions, strict=True)]
    columns = {
        "exact_match": [float(exact_match(*pair)) for pair in pairs],
        "f1": [f1(*pair) for pair in pairs],
        "contained": [float(contains(*pair)) for pair in pairs],
    }
    return {metric: np.array(column) for metric, column in columns.items()}


def _pairs(
    systems: Sequence[System], plan: QaPlan, values: Mapping[Cell, Mapping[str, NDArray[np.float64]]]
) -> Iterator[tuple[Cell, Cell]]:
    """Within a system every mode against block mode; every other system against the first in the same mode."""
    conditions = list(dict.fromkeys(cell.condition for cell in values))
    for condition in conditions:
        for system in systems:
            for mode in plan.modes:
                cell = Cell(system.label, mode, condition)
                for other in (Cell(system.label, "block", condition), Cell(systems[0].label, mode, condition)):
                    if cell in values and other in values and cell != other:
                        yield cell, other


def _refusals(
    questions: Sequence[DrawnQuestion], refused: Mapping[Cell, NDArray[np.float64]], plan: QaPlan, seed: int
) -> Iterator[RefusalScore]:
    clear = np.array([question.holds_answer for question in questions])
    if not clear.any():
        return
    for cell, present in refused.items():
        without = Cell(cell.system, cell.mode, Condition(plan.passages, gold=False))
        if cell.condition != plan.main or without not in refused:
            continue
        absent, present = refused[without][clear], present[clear]
        yield RefusalScore(
            system=cell.system,
            mode=cell.mode,
            questions=len(present),
            precision=bootstrap_ratio(absent, absent + present, seed),
            recall=bootstrap(absent, seed),
            wrong=bootstrap(present, seed),
        )


def _by_group(
    questions: Sequence[DrawnQuestion], plan: QaPlan, values: Mapping[Cell, Mapping[str, NDArray[np.float64]]]
) -> dict[str, dict[str, float]]:
    groups = np.array([question.source.group for question in questions])
    found: dict[str, dict[str, float]] = {}
    for group in sorted(set(groups.tolist())):
        members = groups == group
        found[group] = {"questions": float(members.sum())} | {
            cell_label(cell): float(columns["exact_match"][members].mean())
            for cell, columns in values.items()
            if cell.condition == plan.main
        }
    return found if len(found) > 1 else {}
