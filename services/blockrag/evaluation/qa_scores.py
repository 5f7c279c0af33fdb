"""Cells of question answering, their scores (means with intervals, paired differences, refusals) and their report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.experiment import (
    AnswerScore,
    AnswersReport,
    Values,
    answer_values,
    differences,
    means,
    percent,
    section,
    table,
)
from blockrag.evaluation.experiment_options import Mode, QaOptions
from blockrag.evaluation.scoring import Interval, bootstrap, bootstrap_ratio


@dataclass(frozen=True)
class Condition:
    """What is shown with every question."""

    passages: int
    place: int | None = None
    """Index of the gold passage; None: drawn for each question."""
    gold: bool = True
    """Whether the gold passage is there."""

    @property
    def label(self) -> str:
        if not self.passages:
            return "no passages"
        shown = f"{self.passages} passage{'s' if self.passages > 1 else ''}"
        if not self.gold:
            return f"{shown}, gold absent"
        return shown if self.place is None else f"{shown}, gold at {self.place + 1}"


NO_PASSAGES = Condition(0, gold=False)


@dataclass(frozen=True)
class Cell:
    """One line of answers: who was asked, how, with what shown."""

    system: str
    mode: Mode
    condition: Condition

    @property
    def label(self) -> str:
        """Its name in tables, the condition left out."""
        return f"{self.system}, {self.mode}"


def conditions(options: QaOptions, mode: Mode) -> Iterator[Condition]:
    """What ``mode`` is asked under, the main one first; without passages there is nothing to vary."""
    if mode == "none":
        yield NO_PASSAGES
        return
    passages = options.passages
    yield Condition(passages)
    if options.absent:
        yield Condition(passages, gold=False)
    yield from (Condition(count) for count in options.counts if count != passages)
    spread = min(options.places, passages)
    if spread > 1:
        for number in range(spread):
            yield Condition(passages, round(number * (passages - 1) / (spread - 1)))


@dataclass(frozen=True, kw_only=True)
class Score(AnswerScore):
    """Scores of one cell whose condition can be answered."""

    system: str
    mode: Mode
    condition: str
    passages: int
    place: int | None
    """Index of the gold passage; None: drawn."""
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


@dataclass(frozen=True, kw_only=True)
class Difference(AnswerScore):
    """Paired difference of two cells' means on the same questions: first minus second."""

    first: str
    second: str
    condition: str


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
    systems: Sequence[str],
    options: QaOptions,
    answers: Mapping[Cell, Sequence[str]],
    refusals: Mapping[Cell, Sequence[bool]],
) -> QaScores:
    """Score what ``evaluate_qa`` returned; ``refusals`` says which answers are."""
    seed, main = options.seed, Condition(options.passages)
    refused = {cell: np.array(found, dtype=np.float64) for cell, found in refusals.items()}
    values = {
        cell: answer_values(questions, outputs)
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
            **means(columns, seed),
        )
        for cell, columns in values.items()
    )
    pairs = tuple(
        Difference(
            first=first.label,
            second=second.label,
            condition=first.condition.label,
            **differences(values[first], values[second], seed),
        )
        for first, second in _pairs(systems, options.modes, values)
    )
    absent = tuple(_refusals(questions, refused, main, seed)) if options.absent else ()
    return QaScores(scores, pairs, absent, _by_group(questions, main, values))


def _pairs(systems: Sequence[str], modes: Sequence[Mode], values: Mapping[Cell, Values]) -> Iterator[tuple[Cell, Cell]]:
    """Within a system every mode against block mode; every other system against the first in the same mode."""
    conditions = list(dict.fromkeys(cell.condition for cell in values))
    for condition in conditions:
        for system in systems:
            for mode in modes:
                cell = Cell(system, mode, condition)
                for other in (Cell(system, "block", condition), Cell(systems[0], mode, condition)):
                    if cell in values and other in values and cell != other:
                        yield cell, other


def _refusals(
    questions: Sequence[DrawnQuestion], refused: Mapping[Cell, NDArray[np.float64]], main: Condition, seed: int
) -> Iterator[RefusalScore]:
    clear = np.array([question.holds_answer for question in questions])
    if not clear.any():
        return
    for cell, present in refused.items():
        without = Cell(cell.system, cell.mode, replace(main, gold=False))
        if cell.condition != main or without not in refused:
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
    questions: Sequence[DrawnQuestion], main: Condition, values: Mapping[Cell, Values]
) -> dict[str, dict[str, float]]:
    groups = np.array([question.source.group for question in questions])
    found: dict[str, dict[str, float]] = {}
    for group in sorted(set(groups.tolist())):
        members = groups == group
        found[group] = {"questions": float(members.sum())} | {
            cell.label: float(columns["exact_match"][members].mean())
            for cell, columns in values.items()
            if cell.condition == main
        }
    return found if len(found) > 1 else {}


@dataclass(frozen=True)
class SystemFacts:
    """Which weights answered."""

    label: str
    bundle: str
    version: str
    fingerprint: str
    pear: bool
    """Whether the bundle's PEAR coefficients were folded."""


@dataclass(frozen=True, kw_only=True)
class QaReport(AnswersReport):
    """Everything that a run's tables say, and what is needed to repeat it."""

    questions: int
    without_gold: int
    """Questions passed over, because the file names no answer or no gold passage for them."""
    answer_in_gold: int
    """Questions whose gold piece holds an answer word for word."""
    passage_tokens: int
    systems: tuple[SystemFacts, ...]
    results: QaScores

    def to_markdown(self) -> str:
        """The report as tables."""
        return "\n".join([*self._head(), *self._scores(), *self._differences(), *self._refusals(), *self._groups()])

    def _head(self) -> list[str]:
        systems = [
            f"{one.label}: bundle {one.bundle} {one.version}, fingerprint `{one.fingerprint}`"
            + (", PEAR folded" if one.pear else "")
            for one in self.systems
        ]
        return [
            f"# {self.data}: {self.questions} questions",
            "",
            f"{self.passages} passages of at most {self.passage_tokens} tokens, distractors: {self.distractors}, "
            f"{self.asked}. Percent with bootstrap 95 % intervals "
            f"over questions. {self.answer_in_gold} gold pieces hold an answer word for word; {self.without_gold} "
            f"questions without answer or gold passage were passed over.",
            "",
            *self.facts(*systems),
        ]

    def _scores(self) -> list[str]:
        rows = [
            [one.system, one.mode, one.condition, *one.percents(), percent(one.refused)] for one in self.results.scores
        ]
        return table(["system", "mode", "shown", "exact match", "F1", "contained", "refused"], rows)

    def _differences(self) -> list[str]:
        rows = [[one.first, one.second, one.condition, *one.percents(sign=True)] for one in self.results.differences]
        return section(
            "Paired differences: first minus second, points",
            ["first", "second", "shown", "exact match", "F1", "contained"],
            rows,
        )

    def _refusals(self) -> list[str]:
        rows = [
            [one.system, one.mode, str(one.questions), *map(percent, (one.precision, one.recall, one.wrong))]
            for one in self.results.refusals
        ]
        return section(
            "Refusals: the same questions with and without the gold passage",
            ["system", "mode", "questions", "precision", "recall", "wrongly refused"],
            rows,
        )

    def _groups(self) -> list[str]:
        groups = self.results.by_group
        if not groups:
            return []
        columns = [name for name in next(iter(groups.values())) if name != "questions"]
        rows = [
            [name, f"{values['questions']:.0f}", *(f"{100 * values[column]:.1f}" for column in columns)]
            for name, values in sorted(groups.items(), key=lambda item: -item[1]["questions"])
        ]
        return section("Exact match by group", ["group", "questions", *columns], rows)
