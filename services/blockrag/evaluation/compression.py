"""One run of ``blockrag eval compression``: questions and next paragraphs at several rates, by whoever chooses.

Every cell, a rate with whoever chooses, is asked the same questions with the same passages, or given the same
paragraphs to predict, so that all differences are paired. Passages are shown as retrieval would give them, best first:
to the planner, a passage's rank is its place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from blockrag.configured import configured_bundle
from blockrag.errors import SetupError
from blockrag.evaluation.answering import PlannedPrompt, Prompt, Reader
from blockrag.evaluation.compression_scores import (
    COMPRESSED,
    UNCOMPRESSED,
    Answers,
    Cell,
    CompressionReport,
    CompressionScores,
    is_numeric,
    score_questions,
    score_text,
)
from blockrag.evaluation.compression_selectors import RANDOM, Asked, Selectors, answer_spans
from blockrag.evaluation.compression_text import plan_text_cells, predict_paragraphs
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.experiment import Progress, Status, ask_all, asked_facts, draw_data
from blockrag.evaluation.options import CompressionOptions
from blockrag.evaluation.pieces import Piece
from blockrag.evaluation.ranking import bm25_ranking
from blockrag.modeling.bundle import Bundle, file_sha256
from blockrag.training.refrag.policy_contexts import PolicyReader
from blockrag.v1.common_pb2 import Compression


@dataclass(frozen=True)
class CompressionRun:
    """A finished run."""

    report: CompressionReport
    questions: Sequence[DrawnQuestion] = ()
    answers: Mapping[Cell, Answers] = field(default_factory=dict)


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
    bundle = configured_bundle(options.settings)
    selectors = Selectors.load(bundle)
    selectors.seed = options.seed
    reader = PolicyReader.load(bundle, options.device)
    rates = _rates(options, bundle.chunk_tokens)
    found = CompressionScores(0, 0, (), ())
    asked: Sequence[DrawnQuestion] = ()
    answers: Mapping[Cell, Answers] = {}
    digests: dict[str, str] = {}
    data = kind = ""
    weights = "none"
    if options.data is not None:
        drawn = draw_data(options, bundle, options.passages, 0, status)
        data, digests, kind = drawn.name, dict(drawn.sha256), drawn.distractors
        asked = drawn.draw.questions
        status("answering")
        cells = _cells(options, bundle, selectors, rates)
        with Reader(
            bundle,
            options.settings,
            device=options.device,
            max_answer_tokens=options.max_answer_tokens,
            rater=selectors,
            ability=selectors.ability(bundle.name, bundle.chunk_tokens),
        ) as answering:
            weights = answering.model.weights
            answers = Asking(answering, selectors, reader, options.passages).ask(asked, cells, progress)
        scores, differences = score_questions(asked, answers, options.seed)
        numeric = sum(is_numeric(question.source.answers) for question in asked)
        found = CompressionScores(len(asked), numeric, scores, differences)
    if options.text is not None:
        status("predicting paragraphs")
        text_cells = plan_text_cells(selectors, rates, bundle.chunk_tokens)
        run = predict_paragraphs(options, bundle, reader, selectors, text_cells, progress)
        text, text_differences = score_text(run, options.seed)
        digests[options.text.name] = file_sha256(options.text)
        found = replace(found, paragraphs=options.paragraphs, text=text, text_differences=text_differences)
    report = CompressionReport(
        bundle=bundle.name,
        version=bundle.version,
        fingerprint=bundle.fingerprint,
        compression=bundle.compression_fingerprint,
        chunk_tokens=bundle.chunk_tokens,
        policies=selectors.policies,
        data=data,
        text=options.text.name if options.text is not None else "",
        sha256=digests,
        distractors=kind,
        results=found,
        **asked_facts(options, bundle, weights, started),
    )
    return CompressionRun(report, asked, answers)


def plan_cells(
    selectors: Sequence[str], rates: Sequence[float], chunk_tokens: int, reencode: tuple[str, float] | None
) -> list[Cell]:
    """The cells of a run. ``reencode`` names the selector and the rate that are asked re-encoded too."""
    cells = [Cell(UNCOMPRESSED, 1.0)]
    for rate in sorted(set(rates)):
        if 1 < rate < chunk_tokens:
            cells += [Cell(selector, rate) for selector in selectors]
    if reencode is not None:
        cells.append(Cell(reencode[0], reencode[1], reencoded=True))
    if chunk_tokens > 1:
        cells.append(Cell(COMPRESSED, float(chunk_tokens)))
    return cells


class Asking:
    """Plans and answers questions in every cell, all selectors behind one planner."""

    def __init__(self, reader: Reader, selectors: Selectors, policies: PolicyReader, passages: int) -> None:
        """``policies`` says how hard chunks are to predict."""
        self._reader = reader
        self._selectors = selectors
        self._policies = policies
        self._passages = passages
        self._tokenizer = reader.bundle.load_tokenizer()
        self._losses: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def ask(
        self, questions: Sequence[DrawnQuestion], cells: Sequence[Cell], progress: Progress | None = None
    ) -> dict[Cell, Answers]:
        """Greedy answers of every cell, in the order of ``questions``."""

        def answer(numbers: Sequence[int]) -> Iterator[tuple[Cell, int, tuple[str, int, int]]]:
            asked = [(cell, number) for number in numbers for cell in cells]
            planned = [one for number in numbers for one in self.plan(number, questions[number], cells)]
            # all cells together: the decoder is never short of work
            answers = self._reader.answer(planned)
            for (cell, number), one, text in zip(asked, planned, answers, strict=True):
                yield cell, number, (text, one.slots, one.tokens)

        found = ask_all(questions, cells, answer, progress)
        return {
            cell: Answers(
                [text for text, _, _ in own],
                np.array([slots for _, slots, _ in own], dtype=np.int64),
                np.array([tokens for _, _, tokens in own], dtype=np.int64),
            )
            for cell, own in found.items()
        }

    def plan(self, number: int, question: DrawnQuestion, cells: Sequence[Cell]) -> list[PlannedPrompt]:
        """The question's plan in each cell, by the compressor's planner."""
        pieces = rank_passages(question.passages(self._passages), question.source.text)
        whole = self._reader.plan(Prompt(pieces, question.source.text))
        blocks = [tuple(passage.token_ids) for passage in whole.plan.passages]
        missing = [block for block in dict.fromkeys(blocks) if block not in self._losses]
        self._losses.update(zip(missing, self._policies.chunk_losses(missing), strict=True))
        gold = pieces.index(question.gold)
        spans = answer_spans(blocks[gold], question.source.answers, self._reader.bundle.chunk_tokens, self._tokenizer)
        losses = np.concatenate([self._losses[block] for block in blocks])
        self._selectors.asked = Asked(number, losses, gold, spans)
        return [
            self._reader.plan(
                Prompt(pieces, question.source.text, compression=_compression(cell), reencoded=cell.reencoded)
            )
            for cell in cells
        ]


def _compression(cell: Cell) -> Compression | None:
    if cell.selector == UNCOMPRESSED:
        return None
    # at the highest rate there is nothing to choose, whoever is asked
    return Compression(rate=cell.rate, policy="" if cell.selector == COMPRESSED else cell.selector)


def rank_passages(pieces: Sequence[Piece], question: str) -> tuple[Piece, ...]:
    """The pieces by BM25 over all of them, best first; those without a score last, in order."""
    order = bm25_ranking(pieces)(question)
    order += [number for number in range(len(pieces)) if number not in order]
    return tuple(pieces[number] for number in order)


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


def _cells(options: CompressionOptions, bundle: Bundle, selectors: Selectors, rates: Sequence[float]) -> list[Cell]:
    names = _selectors(options, selectors)
    rate = bundle.chunk_tokens / 2 if options.reencode is None else options.reencode
    chooser = next(iter(selectors.policies), RANDOM)
    exact = (chooser, rate) if rate > 1 and chooser in names and rate in rates else None
    return plan_cells(names, rates, bundle.chunk_tokens, exact)
