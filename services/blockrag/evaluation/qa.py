"""One run of ``blockrag eval qa``: questions over drawn passages, mode by mode.

Every mode and every condition (number of passages, place of the gold one, gold absent) is asked the same questions
with the same passages, so that all differences are paired.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from blockrag.configured import configured_bundle
from blockrag.errors import SetupError
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.experiment import Progress, Status, ask_all, asked_facts, draw_data
from blockrag.evaluation.experiment_options import QaOptions
from blockrag.evaluation.qa_scores import Cell, QaReport, SystemFacts, conditions, score_answers
from blockrag.evaluation.reader import Prompt, Reader
from blockrag.modeling.bundle import Bundle


@dataclass(frozen=True)
class QaRun:
    """A finished run."""

    report: QaReport
    questions: Sequence[DrawnQuestion]
    answers: Mapping[Cell, Sequence[str]]


def run_qa(options: QaOptions, progress: Progress = lambda *_: None, status: Status = lambda _: None) -> QaRun:
    """Run what ``options`` say.

    ``progress`` gets the answers given and wanted, ``status`` what is being done before. Raises ``SetupError`` for bad
    data, ``BundleError`` for a bad bundle, ``PromptTooLongError`` where the passages do not fit the model.
    """
    started = time.perf_counter()
    status("loading the bundle")
    bundles = _bundles(options)
    with ExitStack() as readers:
        systems = {
            label: readers.enter_context(
                Reader(bundle, options.settings, device=options.device, max_answer_tokens=options.max_answer_tokens)
            )
            for label, bundle in bundles.items()
        }
        bundle = next(iter(bundles.values()))
        weights = next(iter(systems.values())).model.weights
        most, absent = max((options.passages, *options.counts)), options.passages if options.absent else 0
        data, distractors, draw = draw_data(options, bundle, most, absent, status)
        questions = draw.questions
        status("answering")
        answers = evaluate_qa(questions, systems, options, progress)
        status("scoring")
        refused = {
            cell: [systems[cell.system].is_refusal(answer) for answer in found] for cell, found in answers.items()
        }
        results = score_answers(questions, tuple(systems), options, answers, refused)
    report = QaReport(
        data=data.name,
        sha256=data.sha256,
        questions=len(questions),
        without_gold=draw.without_gold,
        answer_in_gold=sum(question.holds_answer for question in questions),
        distractors=distractors,
        passage_tokens=bundle.passage_tokens,
        systems=tuple(
            SystemFacts(label, one.name, one.version, one.fingerprint, one.pear is not None)
            for label, one in bundles.items()
        ),
        results=results,
        **asked_facts(options, bundle, weights, started),
    )
    return QaRun(report, questions, answers)


def evaluate_qa(
    questions: Sequence[DrawnQuestion],
    systems: Mapping[str, Reader],
    options: QaOptions,
    progress: Progress = lambda *_: None,
) -> dict[Cell, list[str]]:
    """Greedy answers of every cell, in the order of ``questions``."""
    cells = [
        Cell(system, mode, condition)
        for system in systems
        for mode in options.modes
        for condition in conditions(options, mode)
    ]

    def answer(numbers: Sequence[int]) -> Iterator[tuple[Cell, int, str]]:
        for system, reader in systems.items():
            # all cells together: the decoder is never short of work
            asked = [(cell, number) for cell in cells if cell.system == system for number in numbers]
            planned = [reader.plan(make_prompt(questions[number], cell)) for cell, number in asked]
            for (cell, number), text in zip(asked, reader.answer(planned), strict=True):
                yield cell, number, text

    return ask_all(questions, cells, answer, progress)


def make_prompt(question: DrawnQuestion, cell: Cell) -> Prompt:
    """A question under a cell's condition."""
    condition = cell.condition
    if not condition.passages:
        return Prompt((), question.source.text, cell.mode)
    shown = question.passages(condition.passages, condition.place) if condition.gold else question.absent
    return Prompt(shown, question.source.text, cell.mode)


def _bundles(options: QaOptions) -> dict[str, Bundle]:
    """Bundles by the label they have in the tables; the first is the one that others are compared with."""
    first = configured_bundle(options.settings)
    found = {first.name: first}
    if options.without_pear:
        if first.pear is None:
            raise SetupError(f"{first.path}: has no PEAR coefficients to leave out")
        found[f"{first.name} without PEAR"] = replace(first, pear=None)
    if options.compare is not None:
        settings = options.settings
        other = settings.bundle.model_copy(update={"path": str(options.compare)})
        second = configured_bundle(settings.model_copy(update={"bundle": other}))
        label = second.name if second.name not in found else f"{second.name} {second.fingerprint[:8]}"
        found[label] = second
    return found
