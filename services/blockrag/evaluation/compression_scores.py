"""From answers and losses under compression to scores: means with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.evaluation.compression import UNCOMPRESSED, Answers, Cell, is_numeric
from blockrag.evaluation.compression_selectors import RANDOM
from blockrag.evaluation.compression_text import FULL, NO_CONTEXT, TextRun
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.intervals import Interval, bootstrap, bootstrap_difference, bootstrap_ratio
from blockrag.evaluation.metrics import contains, exact_match, f1

Values = Mapping[str, NDArray[np.float64]]
"""A metric's values, one per question."""
METRICS = ("exact_match", "f1", "contained")


@dataclass(frozen=True)
class CompressionScore:
    """Scores of one cell on the questions."""

    selector: str
    rate: float
    reencoded: bool
    slots: float
    """Of the passages in the prompt, mean."""
    effective_rate: float
    """Tokens of all passages over their slots."""
    exact_match: Interval
    f1: Interval
    contained: Interval
    numeric: Interval | None
    """Exact match of the questions whose answer has a digit; None where there are none."""
    other: Interval | None
    """Exact match of the others."""


@dataclass(frozen=True)
class CompressionDifference:
    """Paired difference of two cells at one rate, or of a cell and no compression: first minus second."""

    first: str
    second: str
    rate: float
    exact_match: Interval
    f1: Interval
    contained: Interval
    numeric: Interval | None


@dataclass(frozen=True)
class TextScore:
    """Next-paragraph prediction of one cell."""

    selector: str
    rate: float
    slots: float
    effective_rate: float | None
    """None without context."""
    nats: Interval
    """Log-perplexity: nats per target token."""
    recovered: Interval | None
    """Share of what full attention gains over no context that this cell gains; None where nothing is gained."""


@dataclass(frozen=True)
class TextDifference:
    """Nats per target token, first minus second: below 0 the first is better."""

    first: str
    second: str
    rate: float
    nats: Interval


@dataclass(frozen=True)
class CompressionScores:
    """What a run found."""

    questions: int
    numeric: int
    scores: tuple[CompressionScore, ...]
    differences: tuple[CompressionDifference, ...]
    paragraphs: int = 0
    text: tuple[TextScore, ...] = ()
    text_differences: tuple[TextDifference, ...] = ()


def score_questions(
    questions: Sequence[DrawnQuestion], answers: Mapping[Cell, Answers], seed: int
) -> tuple[tuple[CompressionScore, ...], tuple[CompressionDifference, ...]]:
    """Scores and differences of what ``ask_questions`` returned; ``seed`` draws the bootstrap's resamples."""
    values = {cell: _values(questions, found.outputs) for cell, found in answers.items()}
    numeric = np.array([is_numeric(question.source.answers) for question in questions])
    scores = tuple(
        CompressionScore(
            selector=cell.selector,
            rate=cell.rate,
            reencoded=cell.reencoded,
            slots=float(answers[cell].slots.mean()),
            effective_rate=float(answers[cell].tokens.sum() / answers[cell].slots.sum()),
            numeric=_mean_of(columns["exact_match"][numeric], seed),
            other=_mean_of(columns["exact_match"][~numeric], seed),
            **{metric: bootstrap(columns[metric], seed) for metric in METRICS},
        )
        for cell, columns in values.items()
    )
    differences = tuple(
        CompressionDifference(
            first=first.label,
            second=second.label,
            rate=first.rate,
            numeric=_mean_of((values[first]["exact_match"] - values[second]["exact_match"])[numeric], seed),
            **{metric: bootstrap_difference(values[first][metric], values[second][metric], seed) for metric in METRICS},
        )
        for first, second in _pairs(list(values))
    )
    return scores, differences


def score_text(run: TextRun, seed: int) -> tuple[tuple[TextScore, ...], tuple[TextDifference, ...]]:
    """Scores and differences of what ``predict_paragraphs`` returned."""
    none, full = run.cells[NO_CONTEXT].nats, run.cells[FULL].nats
    tokens = run.target_tokens
    scores = tuple(
        TextScore(
            selector=cell.label,
            rate=cell.rate,
            slots=float(found.slots.mean()),
            effective_rate=float(found.tokens.sum() / found.slots.sum()) if found.slots.sum() else None,
            nats=_ratio(found.nats, tokens, seed),
            recovered=bootstrap_ratio(none - found.nats, none - full, seed),
        )
        for cell, found in run.cells.items()
    )
    context = [cell for cell in run.cells if cell not in (NO_CONTEXT, FULL)]
    differences = tuple(
        TextDifference(
            first.label, second.label, first.rate, _ratio(run.cells[first].nats - run.cells[second].nats, tokens, seed)
        )
        for first, second in _pairs(context)
    )
    return scores, differences


def _pairs(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Every cell against no compression, every selector against random at its rate, the first against every other.

    Re-encoded is compared with nothing but the same choice composed.
    """
    at = {(cell.label, cell.rate): cell for cell in cells}
    base = at.get((UNCOMPRESSED, 1.0))
    for cell in cells:
        if cell.reencoded:
            yield at[cell.selector, cell.rate], cell
            continue
        if base is not None and cell != base:
            yield cell, base
        chance = at.get((RANDOM, cell.rate))
        if chance is None or cell == chance:
            continue
        yield cell, chance
        first = next(one for one in cells if one.rate == cell.rate)
        if cell != first:
            yield first, cell


def _values(questions: Sequence[DrawnQuestion], outputs: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    pairs = [(output, question.source.answers) for output, question in zip(outputs, questions, strict=True)]
    columns = {
        "exact_match": [float(exact_match(*pair)) for pair in pairs],
        "f1": [f1(*pair) for pair in pairs],
        "contained": [float(contains(*pair)) for pair in pairs],
    }
    return {metric: np.array(column) for metric, column in columns.items()}


def _mean_of(values: NDArray[np.float64], seed: int) -> Interval | None:
    return bootstrap(values, seed) if len(values) else None


def _ratio(above: NDArray[np.float64], below: NDArray[np.int64], seed: int) -> Interval:
    found = bootstrap_ratio(above, below, seed)
    assert found is not None  # every target has a token
    return found
