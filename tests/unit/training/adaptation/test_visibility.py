from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from blockrag.errors import SetupError
from blockrag.modeling.stock_passes import additive_mask, block_mask
from blockrag.training.adaptation.batch import AnswerScores, Batch, Branch, Context, make_batch, score_answers
from blockrag.training.adaptation.visibility import (
    FINAL,
    FLEX_ATTENTION,
    Mask,
    TrainingAttention,
    dense_mask,
    flex_mask,
    mask_segments,
    visible,
)
from tests.models import TINY_VOCAB, make_tiny_model

CPU = torch.device("cpu")


def random_samples(count: int, seed: int = 0, longest: int = 12) -> list[Context]:
    random = Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(random.randrange(7, TINY_VOCAB) for _ in range(length))

    return [
        Context(
            (),
            tuple(ids(random.randint(1, longest)) for _ in range(random.randint(1, 6))),
            (Branch(ids(random.randint(1, 9)), ids(random.randint(1, 5))),),
        )
        for _ in range(count)
    ]


def random_contexts(count: int, seed: int = 0) -> list[Context]:
    random = Random(seed)
    samples = random_samples(4 * count, seed)
    return [
        Context(
            (),
            samples[4 * place].passages,
            tuple(other.branches[0] for other in samples[4 * place : 4 * place + random.randint(2, 4)]),
        )
        for place in range(count)
    ]


def alone(context: Context) -> list[Context]:
    """Each question of a context as a sample of its own."""
    return [Context((), context.passages, (branch,)) for branch in context.branches]


def lengths(sample: Context) -> tuple[list[int], int]:
    return [len(block) for block in sample.blocks], len(sample.branches[0].prompt) + len(sample.branches[0].answer)


def flat(sample: Context) -> list[int]:
    return [token for block in sample.blocks for token in block] + [
        *sample.branches[0].prompt,
        *sample.branches[0].answer,
    ]


def test_the_block_mask_of_each_row_is_the_explicit_one() -> None:
    samples = random_samples(5)
    batch = make_batch(samples, multiple=8)

    mask = dense_mask(batch.segments)

    assert mask.dtype == torch.bool and mask.shape == (5, 1, batch.input_ids.shape[1], batch.input_ids.shape[1])
    for row, sample in enumerate(samples):
        start = batch.input_ids.shape[1] - sample.tokens
        assert torch.equal(mask[row, 0, start:, start:], block_mask(*lengths(sample))[0, 0])
        assert not mask[row, 0, start:, :start].any(), "padding is seen"
        assert not mask[row, 0, :start, start:].any()
        assert mask[row, 0].any(1).all(), "a row of scores without a key is not a number"


def test_the_full_mask_is_causal() -> None:
    samples = random_samples(3, seed=1)
    batch = make_batch(samples)

    mask = dense_mask(mask_segments(batch.segments, "full"))

    for row, sample in enumerate(samples):
        start = batch.input_ids.shape[1] - sample.tokens
        expected = torch.ones(sample.tokens, sample.tokens, dtype=torch.bool).tril()
        assert torch.equal(mask[row, 0, start:, start:], expected)
        assert not mask[row, 0, start:, :start].any()


def test_rows_end_with_their_answers_at_contiguous_positions() -> None:
    samples = random_samples(4, seed=2)
    batch = make_batch(samples)

    for row, sample in enumerate(samples):
        assert batch.input_ids[row, -sample.tokens :].tolist() == flat(sample)
        assert batch.position_ids[row, -sample.tokens :].tolist() == list(range(sample.tokens))
        targets = batch.targets[row]
        assert targets[targets != -100].tolist() == list(sample.branches[0].answer)
        assert (batch.segments[row] == FINAL).sum() == len(sample.branches[0].prompt) + len(sample.branches[0].answer)
    assert batch.tokens == sum(sample.tokens for sample in samples)
    assert batch.answer_tokens == sum(len(sample.branches[0].answer) for sample in samples)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("mask", ["block", "full"])
def test_questions_behind_one_context_do_not_see_one_another(family: str, mask: Mask) -> None:
    contexts = random_contexts(3)
    model = make_tiny_model(family)
    attention = TrainingAttention("auto", CPU)
    attention.install(model)

    def scores(samples: list[Any]) -> AnswerScores:
        batch = make_batch(samples)
        with torch.no_grad():
            return score_answers(forward(model, batch, attention.mask(batch.segments, mask, torch.float32)), batch)

    packed = scores(contexts)
    single = [scores([sample]) for context in contexts for sample in alone(context)]

    assert float(packed.loss) == pytest.approx(sum(float(each.loss) for each in single), rel=1e-5)
    assert int(packed.exact) == sum(int(each.exact) for each in single)


def test_every_answer_of_a_context_is_a_target() -> None:
    contexts = random_contexts(4, seed=8)
    batch = make_batch(contexts, multiple=16)

    answers = [answer for context in contexts for _, answer in context.branches]
    assert batch.count == len(answers)
    assert batch.answer_tokens == sum(map(len, answers))
    for number, answer in enumerate(answers):
        row = (batch.targets != -100) & (batch.answers == number)
        assert batch.targets[row].tolist() == list(answer)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("mask", ["block", "full"])
def test_the_loss_of_a_padded_batch_is_that_of_the_explicit_masks(family: str, mask: str) -> None:
    model = make_tiny_model(family)
    samples = random_samples(4, seed=3)
    expected = 0.0
    for sample in samples:
        tokens = torch.tensor([flat(sample)])
        explicit = additive_mask(block_mask(*lengths(sample)), torch.float32) if mask == "block" else None
        with torch.no_grad():
            logits = model(tokens, attention_mask=explicit).logits[0]
        answer = len(sample.branches[0].answer)
        expected += float(F.cross_entropy(logits[-answer - 1 : -1], tokens[0, -answer:], reduction="sum"))

    batch = make_batch(samples)
    attention = TrainingAttention("auto", CPU)
    attention.install(model)
    with torch.no_grad():
        got = score_answers(forward(model, batch, attention.mask(batch.segments, mask, torch.float32)), batch)

    assert float(got.loss) == pytest.approx(expected, rel=1e-5)


def forward(model: torch.nn.Module, batch: Batch, mask: object) -> torch.Tensor:
    output = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predicted,
    )
    logits: torch.Tensor = output.logits
    return logits


@pytest.mark.parametrize("mask", ["block", "full"])
def test_flex_attention_sees_what_the_dense_mask_lets_it_see(mask: str) -> None:
    batch = make_batch(random_samples(2, seed=4, longest=40), multiple=128)
    segments = mask_segments(batch.segments, mask)
    rows, width = segments.shape

    assert torch.equal(create_mask(visible(segments), rows, None, width, width, device="cpu"), dense_mask(segments))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", ["block", "full"])
def test_flex_attention_equals_attention_with_the_dense_mask(mask: str) -> None:
    batch = make_batch(random_samples(2, seed=5, longest=60), multiple=128)
    segments = mask_segments(batch.segments, mask)
    torch.manual_seed(0)
    query = torch.randn(2, 4, segments.shape[1], 16)
    key, value = torch.randn(2, 2, 2, segments.shape[1], 16).unbind(0)

    tiles = flex_mask(segments)
    got = flex_attention(query, key, value, block_mask=tiles, enable_gqa=True)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(segments), enable_gqa=True)

    assert tiles.shape == (2, 1, segments.shape[1], segments.shape[1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on CUDA only")
def test_flex_and_dense_give_the_same_gradients_on_a_gpu() -> None:
    device = torch.device("cuda")
    batch = make_batch(random_samples(2, seed=6, longest=60), multiple=128).to(device)
    gradients = []
    for kind in ("flex", "dense"):
        model = make_tiny_model("llama", head_dim=32).to(device).train()
        attention = TrainingAttention(kind, device)
        attention.install(model)
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(model, batch, attention.mask(batch.segments, "block", torch.bfloat16))
        score_answers(logits, batch).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))

    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.05


def test_which_attention_a_device_gets() -> None:
    assert not TrainingAttention("auto", CPU).flex
    assert TrainingAttention("auto", torch.device("cuda")).flex
    assert not TrainingAttention("dense", torch.device("cuda")).flex
    with pytest.raises(SetupError, match="no backward pass of FlexAttention on cpu"):
        TrainingAttention("flex", CPU)


def test_transformers_takes_flex_attention_by_our_name() -> None:
    model = make_tiny_model()
    TrainingAttention("flex", torch.device("cuda")).install(model)

    assert model.config._attn_implementation == FLEX_ATTENTION
