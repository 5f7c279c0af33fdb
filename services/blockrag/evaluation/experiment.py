"""What experiments share: the same questions and passages under every cell, so that differences are paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blockrag.evaluation.drawing import Draw, DrawnQuestion, draw_questions
from blockrag.evaluation.environment import describe_environment
from blockrag.evaluation.intervals import Interval, bootstrap, bootstrap_difference
from blockrag.evaluation.metrics import contains, exact_match, f1
from blockrag.evaluation.options import Distractors, ExperimentOptions
from blockrag.evaluation.pieces import PieceMaker
from blockrag.evaluation.question_data import load_questions
from blockrag.evaluation.report import percent
from blockrag.modeling.bundle import Bundle

METRICS = ("exact_match", "f1", "contained")
Values = Mapping[str, NDArray[np.float64]]
"""A metric's values, one per question."""
Progress = Callable[[int, int], None]
Status = Callable[[str], None]
Cell = TypeVar("Cell", bound=Hashable)
Found = TypeVar("Found")

_CHUNK = 16
"""Questions asked in all cells before the next: their blocks fit the decoder's own memory."""


@dataclass(frozen=True)
class DrawnData:
    """Questions of a file."""

    name: str
    sha256: Mapping[str, str]
    distractors: Distractors
    draw: Draw


@dataclass(frozen=True)
class AnswerScore:
    """Means over the questions."""

    exact_match: Interval
    f1: Interval
    contained: Interval

    def percents(self, *, sign: bool = False) -> list[str]:
        """As cells of a table; ``sign`` for differences."""
        return [percent(value, sign=sign) for value in (self.exact_match, self.f1, self.contained)]


def draw_data(options: ExperimentOptions, bundle: Bundle, most: int, absent: int, status: Status) -> DrawnData:
    """The questions of a run with up to ``most`` passages each, ``absent`` of them without the gold one.

    Raises ``SetupError`` for bad data.
    """
    assert options.data is not None
    status("reading the questions")
    data = load_questions(options.data, options.seed)
    kind = options.distractors
    if kind == "auto":
        kind = "same" if any(one.same_kind for one in data.questions) else "bm25"
    status("drawing passages")
    draw = draw_questions(
        data,
        PieceMaker(bundle.template, bundle.load_tokenizer(), bundle.passage_tokens),
        count=options.questions,
        most_passages=most,
        absent_passages=absent,
        distractors=kind,
        seed=options.seed,
    )
    return DrawnData(data.name, dict(data.sha256), kind, draw)


def asked_facts(options: ExperimentOptions, bundle: Bundle, weights: str, started: float) -> dict[str, Any]:
    """Fields of an ``AnswersReport`` that say how answers were made; ``started`` by ``time.perf_counter``.

    ``weights`` are what the model's steps read.
    """
    return {
        "passages": options.passages,
        "max_answer_tokens": options.max_answer_tokens,
        "compute_dtype": bundle.compute_dtype,
        "weights": weights,
        "kv_dtype": bundle.kv_dtype,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": describe_environment(options.device),
    }


def ask_all(
    questions: Sequence[DrawnQuestion],
    cells: Sequence[Cell],
    answer: Callable[[Sequence[int]], Iterable[tuple[Cell, int, Found]]],
    progress: Progress | None = None,
) -> dict[Cell, list[Found]]:
    """What ``answer`` finds in every cell for each question, in the order of ``questions``.

    ``answer`` gets the numbers of a few questions and gives a result for each of them in each of ``cells``.
    """
    found: dict[Cell, dict[int, Found]] = {cell: {} for cell in cells}
    done = 0
    # Questions about one table show the same articles: neighbours share encoded blocks.
    order = sorted(range(len(questions)), key=lambda number: questions[number].source.same_kind[:1])
    for start in range(0, len(order), _CHUNK):
        for cell, number, result in answer(order[start : start + _CHUNK]):
            found[cell][number] = result
            done += 1
        if progress is not None:
            progress(done, len(cells) * len(questions))
    return {cell: [own[number] for number in range(len(questions))] for cell, own in found.items()}


def answer_values(questions: Sequence[DrawnQuestion], outputs: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The metrics of answers, each [questions]."""
    pairs = [(output, question.source.answers) for output, question in zip(outputs, questions, strict=True)]
    columns = {
        "exact_match": [float(exact_match(*pair)) for pair in pairs],
        "f1": [f1(*pair) for pair in pairs],
        "contained": [float(contains(*pair)) for pair in pairs],
    }
    return {metric: np.array(column) for metric, column in columns.items()}


def means(values: Values, seed: int) -> dict[str, Interval]:
    """The mean of every metric; ``seed`` draws the bootstrap's resamples."""
    return {metric: bootstrap(values[metric], seed) for metric in METRICS}


def differences(first: Values, second: Values, seed: int) -> dict[str, Interval]:
    """The mean of every metric's paired differences, first minus second."""
    return {metric: bootstrap_difference(first[metric], second[metric], seed) for metric in METRICS}
