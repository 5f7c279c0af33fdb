"""One run of ``blockrag eval qa``: load, draw, ask, score."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blockrag.errors import SetupError
from blockrag.evaluation.answering import Mode, SlotReader
from blockrag.evaluation.drawing import Distractors, DrawnQuestion, draw_questions
from blockrag.evaluation.environment import describe_environment
from blockrag.evaluation.pieces import PieceMaker
from blockrag.evaluation.qa import Cell, QaPlan, System, evaluate_qa
from blockrag.evaluation.qa_report import QaReport, SystemFacts
from blockrag.evaluation.qa_scores import score_answers
from blockrag.evaluation.question_data import load_questions
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel


@dataclass(frozen=True)
class QaOptions:
    """What a run is asked to do."""

    data: Path
    bundle: Path
    compare: Path | None = None
    """A second bundle, asked the same questions with the same passages' texts."""
    without_pear: bool = False
    """Ask the first bundle also with its PEAR coefficients left out."""
    questions: int = 1000
    passages: int = 10
    distractors: Distractors | None = None
    """None: ``same`` where the data names passages of the same kind, else ``bm25``."""
    modes: tuple[Mode, ...] = ("full", "block")
    counts: tuple[int, ...] = ()
    places: int = 0
    """Places of the gold passage to compare, evenly spread over the passages; 0: none."""
    absent: bool = True
    seed: int = 0
    max_answer_tokens: int = 64
    device: str = "cpu"
    dtype: str = "bfloat16"
    """Of weights, and of K and V."""


@dataclass(frozen=True)
class QaRun:
    """A finished run."""

    report: QaReport
    questions: Sequence[DrawnQuestion]
    answers: Mapping[Cell, Sequence[str]]


def run_qa(
    options: QaOptions,
    progress: Callable[[int, int], None] | None = None,
    status: Callable[[str], None] = lambda _: None,
) -> QaRun:
    """Run what ``options`` say.

    ``progress`` gets the answers given and wanted, ``status`` what is being done before. Raises ``SetupError`` for bad
    data, ``BundleError`` for a bad bundle, ``PromptTooLongError`` where the passages do not fit the model.
    """
    started = time.perf_counter()
    status("loading the bundle")
    bundles = _bundles(options)
    systems = [
        System(
            label,
            SlotReader(
                bundle, SlotModel.load(bundle, device=options.device), max_answer_tokens=options.max_answer_tokens
            ),
        )
        for label, bundle in bundles.items()
    ]
    bundle = next(iter(bundles.values()))
    status("reading the questions")
    data = load_questions(options.data, options.seed)
    kind = options.distractors or ("same" if any(one.same_kind for one in data.questions) else "bm25")
    plan = QaPlan(options.passages, options.modes, options.counts, _places(options), options.absent)
    status("drawing passages")
    draw = draw_questions(
        data,
        PieceMaker(bundle.template, bundle.load_tokenizer(), bundle.passage_tokens),
        count=options.questions,
        most_passages=plan.most_passages,
        absent_passages=plan.passages if plan.absent else 0,
        distractors=kind,
        seed=options.seed,
    )
    status("answering")
    answers = evaluate_qa(draw.questions, systems, plan, progress)
    status("scoring")
    report = QaReport(
        data=data.name,
        sha256=data.sha256,
        questions=len(draw.questions),
        without_gold=draw.without_gold,
        answer_in_gold=sum(question.holds_answer for question in draw.questions),
        passages=options.passages,
        distractors=kind,
        passage_tokens=bundle.passage_tokens,
        max_answer_tokens=options.max_answer_tokens,
        seed=options.seed,
        seconds=round(time.perf_counter() - started, 1),
        systems=tuple(
            SystemFacts(label, one.name, one.version, one.fingerprint, one.pear is not None)
            for label, one in bundles.items()
        ),
        results=score_answers(draw.questions, systems, plan, answers, options.seed),
        environment=describe_environment(options.device),
    )
    return QaRun(report, draw.questions, answers)


def _bundles(options: QaOptions) -> dict[str, Bundle]:
    """Bundles by the label they have in the tables; the first is the one that others are compared with."""
    first = load_bundle(options.bundle, compute_dtype=options.dtype, kv_dtype=options.dtype)
    found = {first.name: first}
    if options.without_pear:
        if first.pear is None:
            raise SetupError(f"{options.bundle}: has no PEAR coefficients to leave out")
        found[f"{first.name} without PEAR"] = replace(first, pear=None)
    if options.compare is not None:
        second = load_bundle(options.compare, compute_dtype=options.dtype, kv_dtype=options.dtype)
        label = second.name if second.name not in found else f"{second.name} {second.fingerprint[:8]}"
        found[label] = second
    return found


def _places(options: QaOptions) -> tuple[int, ...]:
    last, places = options.passages - 1, min(options.places, options.passages)
    if places < 2:
        return ()
    return tuple(round(number * last / (places - 1)) for number in range(places))
