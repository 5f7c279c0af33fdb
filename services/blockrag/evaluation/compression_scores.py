"""Cells of compression, their scores (means with intervals, paired differences) and their report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.evaluation.compression_selectors import RANDOM
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.experiment import (
    AnswerScore,
    AnswersReport,
    answer_values,
    differences,
    means,
    percent,
    section,
)
from blockrag.evaluation.scoring import Interval, bootstrap, bootstrap_ratio

UNCOMPRESSED = "nothing compressed"
COMPRESSED = "everything compressed"
AUTO = "auto"
"""As few whole passages as the question seems to need; no rate is asked for."""


@dataclass(frozen=True)
class Cell:
    """One way to show the passages: a rate, and who chooses what is expanded."""

    selector: str
    """Who chooses; ``UNCOMPRESSED`` and ``COMPRESSED`` where there is nothing to choose."""
    rate: float
    """Tokens of the passages for each slot, at least; 0 where no passages are shown, or no rate is asked for."""
    reencoded: bool = False
    """Mixed passages encoded anew instead of composed."""

    @property
    def label(self) -> str:
        return f"{self.selector}, re-encoded" if self.reencoded else self.selector


NO_CONTEXT = Cell("no context", 0.0)
FULL = Cell("full attention", 1.0)
"""All passages as one block: every token sees those of the passages before its own."""


@dataclass(frozen=True)
class Answers:
    """What a cell found, one entry per question."""

    outputs: list[str]
    slots: NDArray[np.int64]
    """Slots of the passages in the prompt."""
    tokens: NDArray[np.int64]
    """Tokens of the passages."""
    read: NDArray[np.int64]
    """How many passages are in the prompt, if only in part."""
    gold_read: NDArray[np.bool_]
    """Whether all gold ones are among them."""


@dataclass(frozen=True)
class TextLosses:
    """What a cell found, one entry per target."""

    nats: NDArray[np.float64]
    """Of the whole target."""
    slots: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Of the passages before it."""


@dataclass(frozen=True)
class TextRun:
    """Losses of every cell on the same targets."""

    cells: dict[Cell, TextLosses]
    target_tokens: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CompressionScore(AnswerScore):
    """Scores of one cell on the questions."""

    selector: str
    rate: float
    reencoded: bool
    slots: float
    """Of the passages in the prompt, mean."""
    effective_rate: float
    """Tokens of all passages over their slots."""
    read: float
    """Passages in the prompt, if only in part, mean."""
    gold_read: float
    """Share of the prompts with all gold passages among them."""
    numeric: Interval | None
    """Exact match of the questions whose answer has a digit; None where there are none."""
    other: Interval | None
    """Exact match of the others."""


@dataclass(frozen=True, kw_only=True)
class CompressionDifference(AnswerScore):
    """Paired difference of two cells at one rate, or of a cell and no compression: first minus second."""

    first: str
    second: str
    rate: float
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
    """Scores and differences of what ``Asking.ask`` returned; ``seed`` draws the bootstrap's resamples."""
    values = {cell: answer_values(questions, found.outputs) for cell, found in answers.items()}
    numeric = np.array([is_numeric(question.source.answers) for question in questions])
    scores = tuple(
        CompressionScore(
            selector=cell.selector,
            rate=cell.rate,
            reencoded=cell.reencoded,
            slots=float(answers[cell].slots.mean()),
            effective_rate=float(answers[cell].tokens.sum() / answers[cell].slots.sum()),
            read=float(answers[cell].read.mean()),
            gold_read=float(answers[cell].gold_read.mean()),
            numeric=_mean_of(columns["exact_match"][numeric], seed),
            other=_mean_of(columns["exact_match"][~numeric], seed),
            **means(columns, seed),
        )
        for cell, columns in values.items()
    )
    pairs = tuple(
        CompressionDifference(
            first=first.label,
            second=second.label,
            rate=first.rate,
            numeric=_mean_of((values[first]["exact_match"] - values[second]["exact_match"])[numeric], seed),
            **differences(values[first], values[second], seed),
        )
        for first, second in _pairs(list(values))
    )
    return scores, pairs


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
    pairs = tuple(
        TextDifference(
            first.label, second.label, first.rate, _ratio(run.cells[first].nats - run.cells[second].nats, tokens, seed)
        )
        for first, second in _pairs(context)
    )
    return scores, pairs


def is_numeric(answers: Sequence[str]) -> bool:
    """Whether an answer is about a number: its first wording has a digit."""
    return any(character.isdigit() for character in answers[0])


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
        if cell == chance:
            continue
        if chance is not None:
            yield cell, chance
        first = next(one for one in cells if one.rate == cell.rate)
        if cell != first:
            yield first, cell


def _mean_of(values: NDArray[np.float64], seed: int) -> Interval | None:
    return bootstrap(values, seed) if len(values) else None


def _ratio(above: NDArray[np.float64], below: NDArray[np.int64], seed: int) -> Interval:
    found = bootstrap_ratio(above, below, seed)
    assert found is not None  # every target has a token
    return found


@dataclass(frozen=True, kw_only=True)
class CompressionReport(AnswersReport):
    """Everything that a run's tables say, and what is needed to repeat it."""

    bundle: str
    version: str
    fingerprint: str
    compression: str
    """Fingerprint of decoder, chunk encoder and projector; empty where the bundle has no chunk encoder."""
    chunk_tokens: int
    policies: tuple[str, ...]
    text: str
    """Empty where no paragraphs were predicted."""
    results: CompressionScores

    def to_markdown(self) -> str:
        """The report as tables."""
        return "\n".join(
            [*self._head(), *self._questions(), *self._differences(), *self._text(), *self._text_differences()]
        )

    def _head(self) -> list[str]:
        return [
            f"# Compression: {self.bundle} {self.version}, chunks of {self.chunk_tokens} tokens",
            "",
            f"Policies: {', '.join(self.policies) or 'none'}. A rate is how many of the passages' tokens stand for one "
            f"slot; a selector says which chunks are expanded within it. Answers: {self.asked}; paragraphs in float32. "
            "Bootstrap 95 % intervals.",
            "",
            *self.facts(f"fingerprint `{self.fingerprint}`, compression `{self.compression or 'none'}`"),
        ]

    def _questions(self) -> list[str]:
        rows = [
            [
                _shown(one.rate),
                f"{one.selector}, re-encoded" if one.reencoded else one.selector,
                f"{one.slots:.0f}",
                f"{one.effective_rate:.2f}",
                f"{one.read:.1f}",
                f"{100 * one.gold_read:.0f}",
                *one.percents(),
                percent(one.numeric),
                percent(one.other),
            ]
            for one in self.results.scores
        ]
        sizes = ["slots", "effective", "read", "right ones read"]
        header = ["rate", "expanded by", *sizes, "exact match", "F1", "contained", "numbers", "others"]
        title = (
            f"{self.data}: {self.results.questions} questions with {self.passages} passages ({self.distractors}), "
            f"{self.results.numeric} with a number for an answer; percent"
        )
        return section(title, header, rows)

    def _differences(self) -> list[str]:
        rows = [
            [_shown(one.rate), one.first, one.second, *one.percents(sign=True), percent(one.numeric, sign=True)]
            for one in self.results.differences
        ]
        return section(
            "Paired differences: first minus second, points",
            ["rate", "first", "second", "exact match", "F1", "contained", "numbers"],
            rows,
        )

    def _text(self) -> list[str]:
        rows = [
            [
                "–" if one.effective_rate is None else f"{one.rate:g}",
                one.selector,
                f"{one.slots:.0f}",
                "–" if one.effective_rate is None else f"{one.effective_rate:.2f}",
                f"{one.nats:.4f}",
                percent(one.recovered),
            ]
            for one in self.results.text
        ]
        return section(
            f"{self.text}: next paragraph, {self.results.paragraphs} targets; nats per token",
            ["rate", "expanded by", "slots", "effective", "log-perplexity", "gap recovered, %"],
            rows,
        )

    def _text_differences(self) -> list[str]:
        rows = [[f"{one.rate:g}", one.first, one.second, f"{one.nats:+.4f}"] for one in self.results.text_differences]
        return section(
            "Next paragraph, paired: first minus second, nats per token (below 0 the first is better)",
            ["rate", "first", "second", "log-perplexity"],
            rows,
        )


def _shown(rate: float) -> str:
    return f"{rate:g}" if rate else "–"
