"""Composed prompts in training equal what the served model computes, and carry gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from blockrag.modeling.model import SlotModel
from blockrag.training.adaptation.batch import Branch
from blockrag.training.refrag.composed import ComposedDecoder, ComposedPrompt, SlotBank

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
_BLOCKS = [[1], [3, 4, 5, 6, 7, 8, 9, 10], [20, 21, 22]]


def _model(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True))
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_composition_of_blocks_gives_the_logits_of_the_served_model(kind: str) -> None:
    model = _model(kind)
    served = SlotModel.from_pretrained_model(copy.deepcopy(model))
    decoder = ComposedDecoder(model)
    bank = decoder.encode(_BLOCKS)
    resident = [served.to_resident(block) for block in served.encode(_BLOCKS, ["a", "b", "c"])]
    prompts = []
    expected = []
    for order, branches in (([2, 0, 1], [[30, 31, 32], [40]]), ([1], [[50, 51]]), ([], [[60]])):
        slots = np.concatenate([bank.block(number) for number in order]) if order else np.zeros(0, np.int64)
        prompts.append(ComposedPrompt(slots, tuple(Branch(branch, [5]) for branch in branches)))
        for branch in branches:
            sequence = served.new_sequence([resident[number] for number in order], len(branch))
            expected.append(served.forward([(sequence, branch)])[0])

    states = decoder.final(bank, prompts)

    assert states.branches.tolist() == [0, 1, 2, 3]
    assert torch.allclose(decoder.logits(states), torch.stack(expected), atol=1e-4)


def test_a_part_of_a_block_between_embeddings_equals_an_explicit_loop() -> None:
    model = _model()
    reference = copy.deepcopy(model)
    decoder = ComposedDecoder(model)
    embeddings = torch.randn(2, 64)
    bank = SlotBank.join([decoder.encode(_BLOCKS), decoder.encode_embeddings([embeddings])])
    whole, compressed = bank.block(1), bank.block(3)
    slots = np.concatenate([bank.block(0), compressed[:1], whole[4:8]])
    answer = [7, 8, 9]

    states = decoder.final(bank, [ComposedPrompt(slots, (Branch([30, 31], answer),))])

    expected = _explicit(reference, [([1], None), (None, embeddings[:1]), (_BLOCKS[1], slice(4, 8))], [30, 31, *answer])
    assert torch.allclose(decoder.logits(states), expected[1:-1], atol=1e-4)


def _explicit(model: PreTrainedModel, pieces: list[tuple], tokens: list[int]) -> torch.Tensor:  # type: ignore[type-arg]
    """Logits of ``tokens`` behind pieces of blocks, whose keys are un-rotated by hand and turned to their place."""
    from transformers import DynamicCache
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cache = DynamicCache()
    place = 0
    for ids, part in pieces:
        inputs = {"input_ids": torch.tensor([ids])} if ids is not None else {"inputs_embeds": part[None]}
        passed = model(**inputs, use_cache=True).past_key_values
        taken = part if isinstance(part, slice) else slice(None)
        for layer, entry in enumerate(passed.layers):
            keys, values = entry.keys, entry.values
            steps = torch.arange(keys.shape[2])[None]
            cos, sin = model.model.rotary_emb(keys, steps)
            undone, _ = apply_rotary_pos_emb(keys, keys, cos, -sin)
            undone, values = undone[:, :, taken], values[:, :, taken]
            cos, sin = model.model.rotary_emb(keys, torch.arange(place, place + undone.shape[2])[None])
            turned, _ = apply_rotary_pos_emb(undone, undone, cos, sin)
            cache.update(turned, values, layer)
        place = cache.get_seq_length()
    output = model(
        input_ids=torch.tensor([tokens]),
        past_key_values=cache,
        position_ids=torch.arange(place, place + len(tokens))[None],
    )
    return output.logits[0]


def test_gradients_flow_from_answers_through_slots_into_blocks_and_embeddings() -> None:
    decoder = ComposedDecoder(_model().double())
    embeddings = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        bank = SlotBank.join([decoder.encode(_BLOCKS), decoder.encode_embeddings([inputs])])
        slots = np.concatenate([bank.block(2), bank.block(3)])
        return decoder.answer_losses(bank, [ComposedPrompt(slots, (Branch([30], [7]),))]).sum()

    (gradient,) = torch.autograd.grad(loss(embeddings), embeddings)
    step = torch.zeros_like(embeddings)
    step[1, 3] = 1e-2
    difference = (loss(embeddings + step) - loss(embeddings - step)) / 2e-2
    assert gradient[1, 3].item() == pytest.approx(difference.item(), rel=0.02, abs=1e-6)
    assert bool((gradient != 0).all())


def test_padding_changes_nothing() -> None:
    decoder = ComposedDecoder(_model())
    branches = [(Branch([30, 31], [7, 8]), Branch([40], [9])), (Branch([30], [7]),)]

    def losses(numbers: list[int]) -> torch.Tensor:
        bank = decoder.encode([_BLOCKS[1 + number] for number in numbers])
        prompts = [ComposedPrompt(bank.block(place), branches[number]) for place, number in enumerate(numbers)]
        return decoder.answer_losses(bank, prompts)

    assert torch.allclose(losses([0, 1]), torch.cat([losses([0]), losses([1])]), atol=1e-5)
