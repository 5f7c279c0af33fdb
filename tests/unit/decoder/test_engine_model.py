"""The engine with a real (tiny, random) model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.decoder.engine import Engine
from blockrag.decoder.scheduler import EngineLimits
from blockrag.decoder.sequence import GenerationRequest, SamplingParams
from blockrag.modeling.model import SlotModel
from tests.models import make_tiny_model, make_tiny_tokenizer
from tests.unit.decoder.fakes import CollectingSink

_NEW_DETOKENIZER = detokenizer_factory(make_tiny_tokenizer(), " ")
_INSTRUCTION, _PASSAGES = [1], [[3, 40, 41, 4, 50, 51, 52], [3, 60, 4, 70, 71], [3, 80, 81, 82, 4, 90]]
_QUESTION = [5, 45, 67, 89, 6]


@pytest.fixture(scope="module")
def model() -> SlotModel:
    return SlotModel.from_pretrained_model(make_tiny_model(), end_token_ids=[2])


def _generate(model: SlotModel, *requests: GenerationRequest, **limits: int) -> list[str]:
    engine = Engine(model, EngineLimits(**limits), _NEW_DETOKENIZER)
    sinks = [CollectingSink() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        engine.submit(request, sink.push)
    while engine.step():
        pass
    assert all(sink.events[-1].finish is not None for sink in sinks)
    return [sink.text for sink in sinks]


def _full(tokens: list[int], **sampling: float) -> GenerationRequest:
    return GenerationRequest("full", (), tuple(tokens), SamplingParams(max_tokens=24, **sampling))  # type: ignore[arg-type]


def _greedy_from_scratch(model: SlotModel, tokens: list[int], count: int) -> list[int]:
    """Every token from a forward pass over the whole text so far."""
    text = list(tokens)
    for _ in range(count):
        state = model.new_sequence([], len(text))
        token = int(model.forward([(state, text)])[0].argmax())
        state.release()
        if token in model.end_token_ids:
            break
        text.append(token)
    return text[len(tokens) :]


def test_greedy_text_is_that_of_plain_forward_passes(model: SlotModel) -> None:
    prompt = [*_INSTRUCTION, *_PASSAGES[0], *_QUESTION]
    detokenizer = _NEW_DETOKENIZER()
    expected = "".join(map(detokenizer.feed, _greedy_from_scratch(model, prompt, 24)))
    assert _generate(model, _full(prompt)) == [expected]
    # The same when the prefill is cut into pieces.
    assert _generate(model, _full(prompt), max_sequences=2, max_batch_tokens=3) == [expected]


def test_block_mode_composes_the_blocks(model: SlotModel) -> None:
    tokens = [_INSTRUCTION, *_PASSAGES]
    blocks = [model.to_resident(block) for block in model.encode(tokens, [str(n) for n in range(4)])]
    request = GenerationRequest("block", tuple(blocks), tuple(_QUESTION), SamplingParams(max_tokens=24))
    state = model.new_sequence(blocks, 64)
    detokenizer, text, token_ids = _NEW_DETOKENIZER(), "", list(_QUESTION)
    for _ in range(24):
        token = int(model.forward([(state, token_ids)])[0].argmax())
        if token in model.end_token_ids:
            break
        text += detokenizer.feed(token)
        token_ids = [token]
    assert _generate(model, request) == [text]


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(model: SlotModel) -> None:
    request = _full([*_INSTRUCTION, *_QUESTION], temperature=1.0, top_p=0.95, seed=11)
    (alone,) = _generate(model, request)
    others = [_full([1, *_PASSAGES[n % 3], 40 + n], temperature=2.0, seed=n) for n in range(7)]
    assert _generate(model, *others[:4], request, *others[4:])[4] == alone
    (another,) = _generate(model, _full([*_INSTRUCTION, *_QUESTION], temperature=1.0, top_p=0.95, seed=12))
    assert another != alone


def test_the_engine_needs_no_ray_pydantic_or_grpc() -> None:
    program = """
import sys
for name in ("ray", "pydantic", "grpc", "google.protobuf"):
    sys.modules[name] = None
import blockrag.decoder.engine, blockrag.decoder.block_loading, blockrag.decoder.sequence, blockrag.decoder.detokenizer
import blockrag.modeling.model
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_rows_of_the_vocabulary_without_a_token_are_never_sampled() -> None:
    """B6 of the cases: an embedding may be padded beyond the tokenizer's tokens, or have holes."""
    stock = make_tiny_model(vocab_size=320, tie_word_embeddings=False)
    known = set(make_tiny_tokenizer().get_vocab().values())
    unused = set(range(320)) - known
    with torch.no_grad():
        stock.lm_head.weight[sorted(unused)] *= 50
    model = SlotModel.from_pretrained_model(stock, end_token_ids=[2], unused_token_ids=unused)
    assert model.unused_token_ids.tolist() == sorted(unused)
    state = model.new_sequence([], 3)
    assert int(model.forward([(state, [1, 9, 8])]).argmax()) in unused
    for sampling in ({}, {"temperature": 1.5, "seed": 3}):
        assert _generate(model, _full([1, 9, 8], **sampling))[0]
