"""One run of ``blockrag eval compression``: load, draw, ask, predict, score."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockrag.errors import SetupError
from blockrag.evaluation.compression import Answers, Cell, ask_questions, is_numeric, plan_cells
from blockrag.evaluation.compression_reading import CompressionReader
from blockrag.evaluation.compression_report import CompressionReport
from blockrag.evaluation.compression_scores import CompressionScores, score_questions, score_text
from blockrag.evaluation.compression_selectors import RANDOM, Selectors
from blockrag.evaluation.compression_text import TextOptions, plan_text_cells, predict_paragraphs
from blockrag.evaluation.drawing import Distractors, DrawnQuestion, draw_questions
from blockrag.evaluation.environment import describe_environment
from blockrag.evaluation.pieces import PieceMaker
from blockrag.evaluation.question_data import load_questions
from blockrag.modeling.bundle import Bundle, file_sha256, load_bundle
from blockrag.modeling.model import SlotModel
from blockrag.training.refrag.policy_contexts import PolicyReader


@dataclass(frozen=True)
class CompressionOptions:
    """What a run is asked to do."""

    bundle: Path
    data: Path | None = None
    """Questions; None: none are asked."""
    text: TextOptions | None = None
    rates: tuple[float, ...] = ()
    """Empty: 1, and every quarter of the bundle's k up to k."""
    selectors: tuple[str, ...] = ()
    """Empty: all."""
    reencode: float | None = None
    """Rate at which composed passages are compared with re-encoded ones; None: half of k, 0: not at all."""
    questions: int = 300
    passages: int = 10
    distractors: Distractors | None = None
    """None: ``same`` where the data names passages of the same kind, else ``bm25``."""
    seed: int = 0
    max_answer_tokens: int = 32
    device: str = "cpu"
    dtype: str = "bfloat16"
    """Of weights, and of K and V; paragraphs are predicted in float32."""


@dataclass(frozen=True)
class CompressionRun:
    """A finished run."""

    report: CompressionReport
    questions: Sequence[DrawnQuestion] = ()
    answers: Mapping[Cell, Answers] = field(default_factory=dict)


Progress = Callable[[int, int], None]
Status = Callable[[str], None]


def run_compression(
    options: CompressionOptions, progress: Progress | None = None, status: Status = lambda _: None
) -> CompressionRun:
    """Run what ``options`` say.

    ``progress`` gets what is done and wanted of the running part, ``status`` what is being done. Raises ``SetupError``
    for contradictory options and bad data, ``BundleError`` for a bundle without chunk compression.
    """
    if options.data is None and options.text is None:
        raise SetupError("nothing to measure: name questions (--data), a text (--text) or both")
    started = time.perf_counter()
    status("loading the bundle")
    bundle = load_bundle(options.bundle, compute_dtype=options.dtype, kv_dtype=options.dtype)
    selectors = Selectors.load(bundle, options.seed)
    reader = PolicyReader.load(bundle, options.device)
    rates = _rates(options, bundle.chunk_tokens)
    found = CompressionScores(0, 0, (), ())
    asked: Sequence[DrawnQuestion] = ()
    answers: Mapping[Cell, Answers] = {}
    digests: dict[str, str] = {}
    data = kind = ""
    if options.data is not None:
        status("reading the questions")
        source = load_questions(options.data, options.seed)
        data, digests = source.name, dict(source.sha256)
        kind = options.distractors or ("same" if any(one.same_kind for one in source.questions) else "bm25")
        status("drawing passages")
        draw = draw_questions(
            source,
            PieceMaker(bundle.template, bundle.load_tokenizer(), bundle.passage_tokens),
            count=options.questions,
            most_passages=options.passages,
            absent_passages=0,
            distractors=kind,
            seed=options.seed,
        )
        asked = draw.questions
        answers = _ask(options, bundle, reader, selectors, rates, asked, progress, status)
        scores, differences = score_questions(asked, answers, options.seed)
        numeric = sum(is_numeric(question.source.answers) for question in asked)
        found = CompressionScores(len(asked), numeric, scores, differences)
    if options.text is not None:
        status("predicting paragraphs")
        cells = plan_text_cells(selectors, rates, bundle.chunk_tokens)
        run = predict_paragraphs(options.text, bundle, reader, selectors, cells, progress)
        text, text_differences = score_text(run, options.seed)
        digests[options.text.file.name] = file_sha256(options.text.file)
        found = CompressionScores(
            found.questions,
            found.numeric,
            found.scores,
            found.differences,
            options.text.paragraphs,
            text,
            text_differences,
        )
    report = CompressionReport(
        bundle=bundle.name,
        version=bundle.version,
        fingerprint=bundle.fingerprint,
        compression=bundle.compression_fingerprint,
        chunk_tokens=bundle.chunk_tokens,
        policies=selectors.policies,
        data=data,
        text=options.text.file.name if options.text is not None else "",
        sha256=digests,
        passages=options.passages,
        distractors=kind,
        max_answer_tokens=options.max_answer_tokens,
        seed=options.seed,
        seconds=round(time.perf_counter() - started, 1),
        results=found,
        environment=describe_environment(options.device),
    )
    return CompressionRun(report, asked, answers)


def _ask(
    options: CompressionOptions,
    bundle: Bundle,
    policies: PolicyReader,
    selectors: Selectors,
    rates: Sequence[float],
    questions: Sequence[DrawnQuestion],
    progress: Progress | None,
    status: Status,
) -> dict[Cell, Answers]:
    model = SlotModel.load(bundle, device=options.device)
    reader = CompressionReader(bundle, model, policies.compressor, max_answer_tokens=options.max_answer_tokens)
    names = _selectors(options, selectors)
    rate = bundle.chunk_tokens / 2 if options.reencode is None else options.reencode
    chooser = next(iter(selectors.policies), RANDOM)
    exact = (chooser, rate) if rate > 1 and chooser in names and rate in rates else None
    cells = plan_cells(names, rates, bundle.chunk_tokens, exact)
    status("answering")
    return ask_questions(questions, options.passages, cells, reader, policies, selectors, progress)


def _rates(options: CompressionOptions, chunk_tokens: int) -> tuple[float, ...]:
    if not options.rates:
        return tuple(sorted({1.0, *(max(1.0, chunk_tokens * part / 4) for part in (1, 2, 3, 4))}))
    wrong = [rate for rate in options.rates if not 1 <= rate <= chunk_tokens]
    if wrong:
        shown = ", ".join(f"{rate:g}" for rate in wrong)
        raise SetupError(f"rates {shown}: must be from 1 to the bundle's chunk tokens ({chunk_tokens})")
    return options.rates


def _selectors(options: CompressionOptions, selectors: Selectors) -> tuple[str, ...]:
    unknown = [name for name in options.selectors if name not in selectors.names]
    if unknown:
        raise SetupError(f"selectors {', '.join(unknown)}: the bundle has {', '.join(selectors.names)}")
    return options.selectors or selectors.names
