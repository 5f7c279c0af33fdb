from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockrag.modeling.template import READER_TEMPLATE
from blockrag.training.data import ReaderData, load_reader_data
from blockrag.training.feeding import BatchFeed, BatchMaker, BatchRecipe
from blockrag.training.mixture import Mixture
from blockrag.training.packing import PackedBatch, Weights
from blockrag.training.tokenizer import save_tokenizer, tokenizer_texts, train_tokenizer


@pytest.fixture(scope="module")
def data(data_dir: Path) -> ReaderData:
    return load_reader_data(data_dir)


@pytest.fixture(scope="module")
def recipe(data_dir: Path, data: ReaderData, tmp_path_factory: pytest.TempPathFactory) -> BatchRecipe:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(tokenizer_texts(data, 100), 400), folder, 2048)
    return BatchRecipe(
        data_dir=data_dir,
        tokenizer_dir=folder,
        template=READER_TEMPLATE,
        mixture=Mixture(),
        weights=Weights(),
        tokens_per_step=1500,
        parts=2,
        block_masks=True,
        always_long=False,
        multiple=1,
        seed=3,
    )


def _tensors(batches: list[PackedBatch]) -> list[torch.Tensor]:
    parts = [part for batch in batches for part in (batch, *batch.evidence)]
    return [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]


def _same(first: list[PackedBatch], second: list[PackedBatch]) -> bool:
    a, b = _tensors(first), _tensors(second)
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_batches_made_ahead_are_those_made_in_place(recipe: BatchRecipe, data: ReaderData) -> None:
    maker = BatchMaker(recipe, data)
    steps = 7
    with BatchFeed(maker, recipe, processes=2) as feed:
        ahead = [feed.take(step, lambda at: min(1.0, at / steps)) for step in range(steps)]
    expected = [maker.batches(step, step / steps) for step in range(steps)]
    assert all(_same(found, wanted) for found, wanted in zip(ahead, expected, strict=True))
    assert not _same(expected[0], expected[2])


def _context_segments(batches: list[PackedBatch]) -> set[int]:
    return {int(n) for batch in batches for n in batch.segments[batch.in_context].unique()}


def test_the_block_mask_takes_turns_with_the_full_one(recipe: BatchRecipe, data: ReaderData) -> None:
    maker = BatchMaker(recipe, data)
    assert len(_context_segments(maker.batches(0, 0.0))) > 2
    assert _context_segments(maker.batches(1, 0.0)) == {0}
    full_only = BatchMaker(replace(recipe, block_masks=False), data)
    assert _context_segments(full_only.batches(0, 0.0)) == {0}


def test_rows_are_padded_to_a_multiple(recipe: BatchRecipe, data: ReaderData) -> None:
    padded = BatchMaker(replace(recipe, multiple=16), data).batches(1, 0.5)
    assert all(batch.input_ids.shape[1] % 16 == 0 for batch in padded)
    plain = BatchMaker(recipe, data).batches(1, 0.5)
    assert [batch.tokens for batch in padded] == [batch.tokens for batch in plain]


def test_the_longest_rows_come_first(recipe: BatchRecipe, data: ReaderData) -> None:
    found = BatchMaker(replace(recipe, tokens_per_step=3000), data).batches(0, 0.5)
    widths = [batch.input_ids.shape[1] for batch in found]
    assert len(set(widths)) > 1
    assert widths == sorted(widths, reverse=True)
