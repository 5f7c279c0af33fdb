"""One run of ``blockrag eval compression``: questions and next paragraphs at several rates, by whoever chooses.

Every cell, a rate with whoever chooses, is asked the same questions with the same passages, or given the same
paragraphs to predict, so that all differences are paired. Passages are shown as retrieval would give them, best first:
to the planner, a passage's rank is its place.

A paragraph is predicted as in REFRAG (arXiv 2509.01092, section on continual pre-training): the same target after no
context, after all of it and after compressed context, and the share of the gap between the first two that each
recovers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from blockrag.budget import composed_slots
from blockrag.compressor.compression_request import RETRIEVAL, SENTENCES
from blockrag.configured import configured_bundle
from blockrag.errors import SetupError
from blockrag.evaluation.compression_scores import (
    AUTO,
    COMPRESSED,
    FULL,
    NO_CONTEXT,
    UNCOMPRESSED,
    Answers,
    Cell,
    CompressionReport,
    CompressionScores,
    TextLosses,
    TextRun,
    is_numeric,
    score_questions,
    score_text,
)
from blockrag.evaluation.compression_selectors import RANDOM, Asked, Selectors, answer_spans
from blockrag.evaluation.drawing import DrawnQuestion, Piece, bm25_ranking
from blockrag.evaluation.experiment import Progress, Status, ask_all, asked_facts, draw_data
from blockrag.evaluation.experiment_options import CompressionOptions
from blockrag.evaluation.reader import PlannedPrompt, Prompt, Reader
from blockrag.modeling.bundle import Bundle, file_sha256
from blockrag.modeling.refrag.policy_features import policy_ranks
from blockrag.training.refrag.composed import ComposedPrompt
from blockrag.training.refrag.policy_reader import PolicyReader
from blockrag.training.refrag.texts import PassageSource, as_target, read_texts, text_start
from blockrag.v1.common_pb2 import Compression


@dataclass(frozen=True)
class CompressionRun:
    """A finished run."""

    report: CompressionReport
    questions: Sequence[DrawnQuestion] = ()
    answers: Mapping[Cell, Answers] = field(default_factory=dict)


def run_compression(
    options: CompressionOptions, progress: Progress = lambda *_: None, status: Status = lambda _: None
) -> CompressionRun:
    """Run what ``options`` say.

    ``progress`` gets what is done and wanted of the running part, ``status`` what is being done. Raises ``SetupError``
    for contradictory options and bad data. Of a bundle without a chunk encoder, questions are asked with sentences of
    cached blocks and with whole passages.
    """
    if options.data is None and options.text is None:
        raise SetupError("nothing to measure: name questions (--data), a text (--text) or both")
    started = time.perf_counter()
    status("loading the bundle")
    bundle = configured_bundle(options.settings)
    selectors = reader = None
    if bundle.refrag is not None:
        selectors = Selectors.load(bundle)
        selectors.seed = options.seed
        reader = PolicyReader.load(bundle, options.device)
    elif options.text is not None:
        raise SetupError(f"the bundle {bundle.name!r} has no chunk encoder: paragraphs (--text) need one")
    rates = _rates(options, bundle.chunk_tokens)
    found = CompressionScores(0, 0, (), ())
    asked: Sequence[DrawnQuestion] = ()
    answers: Mapping[Cell, Answers] = {}
    digests: dict[str, str] = {}
    data = kind = ""
    weights = "none"
    if options.data is not None:
        source, kind, draw = draw_data(options, bundle, options.passages, 0, status, pairs=options.pairs)
        data, digests = source.name, dict(source.sha256)
        asked = draw.questions
        status("answering")
        cells = _cells(options, bundle, selectors, rates)
        with Reader(
            bundle,
            options.settings,
            device=options.device,
            max_answer_tokens=options.max_answer_tokens,
            rater=selectors,
            ability=None if selectors is None else selectors.ability(bundle.name, bundle.chunk_tokens),
        ) as answering:
            weights = answering.model.weights
            answers = Asking(answering, selectors, reader, options.passages).ask(asked, cells, progress)
        scores, differences = score_questions(asked, answers, options.seed)
        numeric = sum(is_numeric(question.source.answers) for question in asked)
        found = CompressionScores(len(asked), numeric, scores, differences)
    if options.text is not None and selectors is not None and reader is not None:
        status("predicting paragraphs")
        names = (*selectors.policies, *TEXT_SELECTORS)
        text_cells = [NO_CONTEXT, FULL, *plan_cells(names, rates, bundle.chunk_tokens, None)]
        run = predict_paragraphs(options, bundle, reader, selectors, text_cells, progress)
        text, text_differences = score_text(run, options.seed)
        digests[options.text.name] = file_sha256(options.text)
        found = replace(found, paragraphs=options.paragraphs, text=text, text_differences=text_differences)
    report = CompressionReport(
        bundle=bundle.name,
        version=bundle.version,
        fingerprint=bundle.fingerprint,
        compression=bundle.compression_fingerprint if selectors is not None else "",
        chunk_tokens=bundle.chunk_tokens,
        policies=selectors.policies if selectors is not None else (),
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


@dataclass
class Asking:
    """Plans and answers questions in every cell, all selectors behind one planner."""

    reader: Reader
    selectors: Selectors | None
    policies: PolicyReader | None
    """Says how hard chunks are to predict; like the selectors None where the bundle has no chunk encoder."""
    passages: int

    def __post_init__(self) -> None:
        self._tokenizer = self.reader.bundle.load_tokenizer()
        self._losses: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def ask(
        self, questions: Sequence[DrawnQuestion], cells: Sequence[Cell], progress: Progress = lambda *_: None
    ) -> dict[Cell, Answers]:
        """Greedy answers of every cell, in the order of ``questions``."""

        def answer(numbers: Sequence[int]) -> Iterator[tuple[Cell, int, tuple[str, PlannedPrompt]]]:
            asked = [(cell, number) for number in numbers for cell in cells]
            planned = [one for number in numbers for one in self.plan(number, questions[number], cells)]
            # all cells together: the decoder is never short of work
            answers = self.reader.answer(planned)
            for (cell, number), one, text in zip(asked, planned, answers, strict=True):
                yield cell, number, (text, one)

        found = ask_all(questions, cells, answer, progress)
        return {
            cell: Answers(
                [text for text, _ in own],
                np.array([one.slots for _, one in own], dtype=np.int64),
                np.array([one.tokens for _, one in own], dtype=np.int64),
                np.array([len(one.read) for _, one in own], dtype=np.int64),
                np.array([one.read >= set(asked.golds) for asked, (_, one) in zip(questions, own, strict=True)]),
            )
            for cell, own in found.items()
        }

    def plan(self, number: int, question: DrawnQuestion, cells: Sequence[Cell]) -> list[PlannedPrompt]:
        """The question's plan in each cell, by the compressor's planner."""
        pieces = rank_passages(question.passages(self.passages), question.source.text)
        if self.selectors is not None and self.policies is not None:  # what the rules know of a question
            whole = self.reader.plan(Prompt(pieces, question.source.text))
            blocks = [tuple(passage.token_ids) for passage in whole.plan.passages]
            missing = [block for block in dict.fromkeys(blocks) if block not in self._losses]
            self._losses.update(zip(missing, self.policies.chunk_losses(missing), strict=True))
            k = self.reader.bundle.chunk_tokens
            gold = {
                place: answer_spans(blocks[place], part.answers, k, self._tokenizer)
                for place, part in zip(map(pieces.index, question.golds), question.source.parts, strict=True)
            }
            losses = np.concatenate([self._losses[block] for block in blocks])
            self.selectors.asked = Asked(number, losses, gold)
        return [
            self.reader.plan(
                Prompt(
                    pieces,
                    question.source.text,
                    compression=_compression(cell),
                    best_last=self.reader.settings.gateway.best_passage == "last",
                    reencoded=cell.reencoded,
                )
            )
            for cell in cells
        ]


def _compression(cell: Cell) -> Compression | None:
    if cell.selector == UNCOMPRESSED:
        return None
    if cell.selector == AUTO:
        return Compression(auto=True)
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


def _selectors(options: CompressionOptions, known: Sequence[str]) -> Sequence[str]:
    unknown = [name for name in options.selectors if name not in known]
    if unknown:
        raise SetupError(f"selectors {', '.join(unknown)}: the bundle has {', '.join(known)}")
    return options.selectors or known


def _cells(
    options: CompressionOptions, bundle: Bundle, selectors: Selectors | None, rates: Sequence[float]
) -> list[Cell]:
    known = (SENTENCES, RETRIEVAL) if selectors is None else selectors.names
    chosen = _selectors(options, (*known, AUTO))
    names, auto = [name for name in chosen if name != AUTO], [Cell(AUTO, 0.0)] if AUTO in chosen else []
    if selectors is None:
        cells = plan_cells(names, rates, bundle.chunk_tokens, None)
        return [cell for cell in cells if cell.selector != COMPRESSED] + auto
    rate = bundle.chunk_tokens / 2 if options.reencode is None else options.reencode
    chooser = next(iter(selectors.policies), RANDOM)
    exact = (chooser, rate) if rate > 1 and chooser in names and rate in rates else None
    return plan_cells(names, rates, bundle.chunk_tokens, exact) + auto


TEXT_SELECTORS = (RANDOM, "high perplexity", "low perplexity", RETRIEVAL)
"""Rules that need no question; a text's last paragraphs first is ``retrieval`` with the nearest ranked best."""


def predict_paragraphs(
    options: CompressionOptions,
    bundle: Bundle,
    reader: PolicyReader,
    selectors: Selectors,
    cells: Sequence[Cell],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> TextRun:
    """Losses of ``options.paragraphs`` targets of ``options.text`` in every cell.

    Raises SetupError for a bad file or too short texts.
    """
    assert options.text is not None
    tokenizer = bundle.load_tokenizer()
    source = PassageSource(read_texts([options.text]), tokenizer, bundle.template, bundle.passage_tokens)
    instruction = bundle.template.instruction_ids(tokenizer)
    random = Random(options.seed)
    count = options.paragraphs
    found = {
        cell: TextLosses(np.zeros(count), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64))
        for cell in cells
    }
    target_tokens = np.zeros(count, dtype=np.int64)
    for number in range(count):
        drawn = source.draw(options.context + 1, random, least=options.context + 1)
        *passages, target = drawn
        branch = as_target(target, text_start(drawn[0], drawn[1:]))
        target_tokens[number] = len(branch.answer)
        context = reader.capture(instruction, passages)
        sizes = [len(passage) for passage in passages]
        selectors.asked = Asked(number, np.concatenate(reader.chunk_losses(passages)))
        question = reader.compressor.embed([branch.prompt])[0].cpu()
        embeddings = [one.cpu() for one in context.embeddings]
        # nothing was retrieved: the paragraph nearest to the target counts as the best, as in training
        ranks = policy_ranks(False, range(len(passages)))
        chosen = {
            name: selectors.rate(name, passages, embeddings, branch.prompt, question, ranks)
            for name in {cell.selector for cell in found}
            if name in selectors.names
        }
        either = np.zeros(context.chunks, dtype=np.float32)
        prompts: dict[Cell, ComposedPrompt] = {}
        for cell, losses in found.items():
            losses.tokens[number] = context.tokens
            if cell == NO_CONTEXT:
                prompts[cell] = context.without_passages(branch)
            elif cell != FULL:
                mask = context.mask_at(chosen.get(cell.selector, either), cell.rate)
                losses.slots[number] = composed_slots(sizes, mask, context.chunk_tokens)
                prompts[cell] = context.prompt(branch, mask)
        tokens = len(branch.answer)
        for cell, nats in zip(prompts, reader.prompt_losses(context, list(prompts.values())).tolist(), strict=True):
            found[cell].nats[number] = nats * tokens
        if FULL in found:
            found[FULL].slots[number] = context.tokens
            found[FULL].nats[number] = reader.whole_loss(instruction, passages, branch) * tokens
        progress(number + 1, count)
    return TextRun(found, target_tokens)
