"""Answers of the engine core against one stock forward pass per token with explicit masks and positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.errors import PromptTooLongError
from blockrag.evaluation.drawing import Piece
from blockrag.evaluation.experiment_options import MODES, Mode
from blockrag.evaluation.reader import Prompt, Reader, compose_without_reencoding
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.settings import DecoderSettings, Settings
from tests.models import make_tiny_bundle

PIECES = [
    Piece("Fiji", "The capital is Suva."),
    Piece("Tonga", "The capital of the land is the largest city there was."),
    Piece("Niue", "It was founded."),
]
PROMPTS = [
    Prompt((PIECES[0], PIECES[1]), "What is the capital of Fiji?"),
    Prompt((PIECES[2],), "When was it founded?"),
    Prompt((PIECES[1], PIECES[0], PIECES[2]), "What was there?"),
    Prompt((), "What is the largest city?"),
]
TOKENS = 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(make_tiny_bundle(tmp_path_factory.mktemp("answering") / "tiny", seed=1))


@pytest.fixture(scope="module")
def reader(bundle: Bundle) -> Iterator[Reader]:
    with Reader(bundle, Settings(), max_answer_tokens=TOKENS) as opened:
        yield opened


def _answers(reader: Reader, mode: Mode, prompts: Sequence[Prompt] = PROMPTS) -> list[str]:
    return reader.answer([reader.plan(replace(prompt, mode=mode)) for prompt in prompts])


def _naive(bundle: Bundle, model: PreTrainedModel, prompt: Prompt, mode: Mode) -> str:
    """The whole prompt again for every token; what each mode means is written out here."""
    tokenizer, template = bundle.load_tokenizer(), bundle.template
    passages = () if mode == "none" else prompt.passages
    blocks = [
        template.instruction_ids(tokenizer),
        *(template.passage_ids(tokenizer, piece.title, piece.text) for piece in passages),
    ]
    context = sum(map(len, blocks))
    ids = [token for block in blocks for token in block] + template.final_ids(tokenizer, prompt.question)
    end = tokenizer.convert_tokens_to_ids(template.end)
    found: list[int] = []
    for _ in range(TOKENS):
        mask = torch.ones(len(ids), len(ids)).tril().bool()
        positions = list(range(len(ids)))
        start = 0
        for block in blocks if mode in ("block", "no-reencoding") else []:
            mask[start : start + len(block), :start] = False
            if mode == "no-reencoding":
                positions[start : start + len(block)] = range(len(block))
            start += len(block)
        assert start in (0, context)
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None],
                position_ids=torch.tensor([positions]),
            ).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        found.append(token)
        ids.append(token)
    detokenizer = detokenizer_factory(tokenizer, template.answer_prefix)()
    return "".join(map(detokenizer.feed, found))


@pytest.mark.parametrize("mode", MODES)
def test_batched_answers_are_those_of_one_pass_per_token(bundle: Bundle, reader: Reader, mode: Mode) -> None:
    model = load_stock_model(bundle)
    assert _answers(reader, mode) == [_naive(bundle, model, prompt, mode) for prompt in PROMPTS]


def test_modes_differ(reader: Reader) -> None:
    answers = {mode: tuple(_answers(reader, mode)) for mode in MODES}
    assert len(set(answers.values())) == len(MODES)


def test_answers_do_not_depend_on_what_is_kept_or_batched(bundle: Bundle, reader: Reader) -> None:
    narrow = Settings(decoder=DecoderSettings(max_sequences=1, max_batch_tokens=40, l1_mb=1))
    with Reader(bundle, narrow, max_answer_tokens=TOKENS) as alone:
        for mode in MODES:
            assert _answers(alone, mode) == _answers(reader, mode)
    assert reader.answer([]) == []


def test_a_prompt_that_serving_would_shorten_is_refused(reader: Reader) -> None:
    with pytest.raises(PromptTooLongError, match="400 passages do not fit: over the token budget"):
        reader.plan(Prompt(tuple(PIECES[1:2]) * 400, "What is it?"))


def test_a_refusal_is_known_by_its_words(reader: Reader) -> None:
    assert reader.is_refusal("Not in the passages.")
    assert not reader.is_refusal("not in the passages of time")
    assert not reader.is_refusal("")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_reencoding_every_block_stands_as_if_it_were_alone(bundle: Bundle, dtype: str) -> None:
    model = SlotModel.load(bundle, compute_dtype=dtype, kv_dtype=dtype)
    encoded = model.encode([[5, 6, 7], [8, 9], [10, 11, 12, 13]], ["a", "b", "c"])
    blocks = [model.to_resident(block) for block in encoded]
    composed = compose_without_reencoding(model, blocks, 4)
    assert (composed.num_slots, composed.free_slots) == (9, 4)
    start = 0
    for block in blocks:
        alone = model.new_sequence([block], 0)
        span = slice(start, start + block.num_slots)
        for layer in range(model.num_layers):
            for whole, part in zip(composed.layer(layer), alone.layer(layer), strict=True):
                assert torch.equal(whole[:, span], part[:, : block.num_slots])
        start += block.num_slots
