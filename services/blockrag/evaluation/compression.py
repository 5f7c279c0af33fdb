"""Questions and next paragraphs under compression: rates, selectors, and what is compared with what.

Every cell, a rate with whoever chooses, is asked the same questions with the same passages, or given the same
paragraphs to predict, so that all differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockrag.evaluation.compression_reading import Composition, CompressionReader
from blockrag.evaluation.compression_selectors import (
    ChoiceInput,
    Selectors,
    answer_spans,
    mask_at_rate,
    slots_of,
)
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.pieces import Piece
from blockrag.evaluation.ranking import bm25_ranking
from blockrag.training.refrag.policy_contexts import PolicyReader

UNCOMPRESSED = "nothing compressed"
COMPRESSED = "everything compressed"

_CHUNK = 16
"""Questions answered in all cells before the next are encoded: their passages fit what a reader keeps."""


@dataclass(frozen=True)
class Cell:
    """One way to show the passages: a rate, and who chooses what is expanded."""

    selector: str
    """Who chooses; ``UNCOMPRESSED`` and ``COMPRESSED`` where there is nothing to choose."""
    rate: float
    """Tokens of the passages for each slot, at least; 0 where no passages are shown."""
    reencoded: bool = False
    """Mixed passages encoded anew instead of composed."""

    @property
    def label(self) -> str:
        return f"{self.selector}, re-encoded" if self.reencoded else self.selector


@dataclass(frozen=True)
class Answers:
    """What a cell found, one entry per question."""

    outputs: list[str]
    slots: NDArray[np.int64]
    """Slots of the passages in the prompt."""
    tokens: NDArray[np.int64]
    """Tokens of the passages."""


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


def ask_questions(
    questions: Sequence[DrawnQuestion],
    passages: int,
    cells: Sequence[Cell],
    reader: CompressionReader,
    policies: PolicyReader,
    selectors: Selectors,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Cell, Answers]:
    """Greedy answers of every cell, in the order of ``questions``, each with ``passages`` passages.

    ``policies`` says how hard chunks are to predict. ``progress`` gets how many answers are there and will be.
    """
    total = len(questions)
    found = {
        cell: Answers([""] * total, np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)) for cell in cells
    }
    losses: dict[Piece, NDArray[np.float32]] = {}
    done = 0
    # Questions about one table show the same articles: neighbours share encoded passages.
    order = sorted(range(total), key=lambda number: questions[number].source.same_kind[:1])
    for start in range(0, total, _CHUNK):
        numbers = order[start : start + _CHUNK]
        shown = {number: questions[number].passages(passages) for number in numbers}
        compositions: list[Composition] = []
        asked: list[tuple[Cell, int]] = []
        reader.passages([piece for pieces in shown.values() for piece in pieces])
        for number in numbers:
            question, pieces = questions[number], shown[number]
            choice = _choice(number, question, pieces, reader, policies, losses)
            scores = {name: selectors.scores(name, choice) for name in {cell.selector for cell in cells}
                      if name in selectors.names}  # fmt: skip
            for cell in cells:
                mask = mask_at_rate(choice.passages, reader.chunk_tokens, scores.get(cell.selector), cell.rate)
                found[cell].slots[number] = slots_of(choice.passages, reader.chunk_tokens, mask)
                found[cell].tokens[number] = sum(map(len, choice.passages))
                compositions.append(Composition(pieces, question.source.text, mask, cell.reencoded))
                asked.append((cell, number))
        # all cells together: the larger the batches, the less a step costs
        for (cell, number), answer in zip(asked, reader.answer(compositions), strict=True):
            found[cell].outputs[number] = answer
        done += len(asked)
        if progress is not None:
            progress(done, total * len(cells))
    return found


def _choice(
    number: int,
    question: DrawnQuestion,
    pieces: Sequence[Piece],
    reader: CompressionReader,
    policies: PolicyReader,
    losses: dict[Piece, NDArray[np.float32]],
) -> ChoiceInput:
    encoded = reader.passages(pieces)
    shown = [encoded[piece] for piece in pieces]
    missing = [piece for piece in dict.fromkeys(pieces) if piece not in losses]
    measured = policies.chunk_losses([encoded[piece].token_ids for piece in missing])
    losses.update(zip(missing, measured, strict=True))
    gold = pieces.index(question.gold)
    asked = reader.question_ids(question.source.text)
    return ChoiceInput.shown(
        shown,
        number=number,
        question=asked,
        question_embeddings=reader.compressor.embed([asked])[0],
        ranks=rank_passages(pieces, question.source.text),
        chunk_losses=np.concatenate([losses[piece] for piece in pieces]),
        gold=gold,
        spans=answer_spans(shown[gold].token_ids, question.source.answers, reader.chunk_tokens, reader.tokenizer),
    )


def rank_passages(pieces: Sequence[Piece], question: str) -> list[int]:
    """Place of each piece in the BM25 ranking of all of them, 0 the best; those without a score last, in order."""
    order = bm25_ranking(pieces)(question)
    order += [number for number in range(len(pieces)) if number not in order]
    ranks = [0] * len(pieces)
    for rank, number in enumerate(order):
        ranks[number] = rank
    return ranks


def is_numeric(answers: Sequence[str]) -> bool:
    """Whether an answer is about a number: its first wording has a digit."""
    return any(character.isdigit() for character in answers[0])
