"""Making the batches of training steps: in the training's own process, or ahead of it in others.

Drawing and tokenising contexts is plain Python. On a CPU it hides in a step; a GPU would wait for it most of the time,
so there the batches of the next steps are made by processes of their own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

import torch

from blockrag.modeling.template import PromptTemplate
from blockrag.training.contexts import Context, ContextSampler
from blockrag.training.data import ReaderData, load_reader_data
from blockrag.training.drafts import BatchShape
from blockrag.training.mixture import Mixture, batch_shape
from blockrag.training.packing import PackedBatch, Weights, pack, row_tokens
from blockrag.training.related_words import load_related_words
from blockrag.training.tokenizer import load_template_tokenizer


@dataclass(frozen=True)
class BatchRecipe:
    """Everything that decides what the batches of a step hold, beside the step and how far the training is."""

    data_dir: Path
    tokenizer_dir: Path
    template: PromptTemplate
    mixture: Mixture
    weights: Weights
    tokens_per_step: int
    parts: int
    block_masks: bool
    """Whether the block mask takes turns with the full one."""
    always_long: bool
    """Whether contexts are long from the beginning."""
    multiple: int
    """Rows are padded to a multiple of so many tokens; a GPU's attention kernels want 8 or more."""
    seed: int
    related_words: Path | None = None
    """A sentence encoder's directory, from which questions in other words take theirs; None: they use none."""


class BatchMaker:
    """Makes the batches of any step: a pure function of the recipe, the step and the progress."""

    def __init__(self, recipe: BatchRecipe, data: ReaderData) -> None:
        self._recipe = recipe
        tokenizer = load_template_tokenizer(recipe.tokenizer_dir)
        related = load_related_words(recipe.related_words) if recipe.related_words else {}
        self._sampler = ContextSampler(data, tokenizer, recipe.template, recipe.mixture, related)

    def batches(self, step: int, progress: float) -> list[PackedBatch]:
        """The parts of a step: contexts of one shape, like lengths together so that little is padding, longest first.

        Threads that share the parts out then end at about the same time.
        """
        recipe = self._recipe
        random = Random(f"{recipe.seed}/{step}")
        shape = batch_shape(random, 1.0 if recipe.always_long else progress, recipe.mixture)
        rows = max(2, round(recipe.tokens_per_step / shape.row_tokens))
        contexts = sorted((self._sampler.sample(shape, random) for _ in range(rows)), key=row_tokens, reverse=True)
        size = -(-rows // recipe.parts)
        block = recipe.block_masks and step % 2 == 0
        return [
            pack(contexts[at : at + size], block=block, weights=recipe.weights, multiple=recipe.multiple)
            for at in range(0, rows, size)
        ]

    def probes(self, count: int) -> dict[str, list[Context]]:
        """Held-out contexts of five passages of 128 tokens, with one question each, by name of the source."""
        return self._sampler.probes(BatchShape(5, 128), count, Random(self._recipe.seed))


class BatchFeed:
    """Gives the batches of one step after the other.

    With ``processes``, that many make the next steps' batches ahead. They see the same ``progress`` as the training
    would where it is a function of the step; with a time budget they see it as it was two rounds of processes before.
    """

    def __init__(self, maker: BatchMaker, recipe: BatchRecipe, processes: int = 0) -> None:
        self._maker = maker
        self._ahead: dict[int, Future[list[PackedBatch]]] = {}
        self._depth = 2 * processes
        # Not forked: the training's process has threads and perhaps a GPU's context.
        context = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(processes, context, initializer=_start, initargs=(recipe,)) if processes else None
        )

    def take(self, step: int, progress: Callable[[int], float]) -> list[PackedBatch]:
        """The batches of ``step``; ``progress`` tells how far the training is (0 to 1) at a step to come."""
        if self._pool is None:
            return self._maker.batches(step, progress(step))
        for number in range(step, step + self._depth):
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(_make, number, progress(number))
        return self._ahead.pop(step).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_maker: BatchMaker | None = None


def _start(recipe: BatchRecipe) -> None:
    global _maker
    torch.set_num_threads(1)
    _maker = BatchMaker(recipe, load_reader_data(recipe.data_dir))


def _make(step: int, progress: float) -> list[PackedBatch]:
    assert _maker is not None
    return _maker.batches(step, progress)
