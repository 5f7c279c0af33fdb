import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from blockrag.training.attention import register
from blockrag.training.config import ModelShape
from blockrag.training.contexts import Branch, Context
from blockrag.training.evidence import EvidenceLosses, Watched, find_evidence, missed, watched_layers
from blockrag.training.optimizer import build_optimizers
from blockrag.training.packing import Weights, pack
from blockrag.training.step import Part, hidden_states, update


def test_evidence_is_the_answer_and_the_words_around_it_in_its_block() -> None:
    blocks = [[1], [3, *range(100, 140)], [3, 40, 41, 42]]
    found = find_evidence(blocks, [50, 60], [[120, 121], [41]], width=70)
    assert found.asked.tolist() == [50, 60]
    assert found.exact[0].nonzero().flatten().tolist() == [22, 23]
    assert found.around[0].nonzero().flatten().tolist() == list(range(22 - 14, 23 + 14 + 1))
    assert found.exact[1].nonzero().flatten().tolist() == [44]
    assert found.around[1].nonzero().flatten().tolist() == [42, 43, 44, 45], "no word of another block"


def test_answers_that_stand_nowhere_or_everywhere_are_left_out() -> None:
    found = find_evidence([[1], [3, 7, 7, 7, 8]], [5, 6, 7, 8], [[9], [7], [7, 8], []], width=10)
    assert found.asked.tolist() == [7]
    assert find_evidence([[1]], [], [], width=4).exact.shape == (0, 4)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_exact_places_spell_the_answer(blocks: list[list[int]], answer: list[int]) -> None:
    row = [token for block in blocks for token in block]
    found = find_evidence(blocks, [len(row)], [answer], width=len(row) + 1)
    starts = [n for n in range(len(row)) if row[n : n + len(answer)] == answer]
    if not 1 <= len(starts) <= 2:
        assert not len(found.asked)
        return
    places = set(found.exact[0].nonzero().flatten().tolist())
    assert {row[place] for place in places} <= set(answer)
    assert set(starts) <= places
    assert places <= set(found.around[0].nonzero().flatten().tolist())


def test_the_loss_is_the_noisy_or_of_the_heads() -> None:
    attended = torch.tensor([[[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], [[0.1, 0.1, 0.8], [0.0, 0.0, 1.0]]])
    wanted = torch.tensor([[True, False, True], [False, True, False]])
    losses = missed(attended, wanted)
    assert losses[0].item() == pytest.approx(-math.log(1 - (1 - 0.7) * (1 - 0.9)), abs=1e-5)
    assert losses[1].item() == pytest.approx(-math.log(1e-6), rel=0.01), "nobody looks there: bounded"
    one = missed(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[True, False]]))
    assert one.item() == pytest.approx(0, abs=1e-5), "one head that looks there is enough"


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = ModelShape(vocab_size=80, width=32, layers=4, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    model = LlamaForCausalLM(shape.config())
    model.set_attn_implementation(register())
    return model


CONTEXTS = [
    Context(
        [[1], [3, *range(10, 40)], [3, *range(40, 70)]],
        [Branch([5, token - 1, 6], [token, 2]) for token in (15, 25, 45, 60)],
    )
]


def _means(model: LlamaForCausalLM) -> dict[str, float]:
    batch = pack(CONTEXTS, block=True, weights=Weights())
    losses = EvidenceLosses(batch.evidence, watched_layers(4))
    with torch.no_grad():
        hidden_states(model, batch, "cpu", losses)
    assert losses.questions == 4
    return {f"{kind} {layer}": float(found.mean()) for (kind, layer), found in losses.found.items()}


def test_watching_the_attention_does_not_change_it(model: LlamaForCausalLM) -> None:
    batch = pack(CONTEXTS, block=True, weights=Weights())
    with torch.no_grad():
        plain = hidden_states(model, batch, "cpu")
        watched = hidden_states(
            model, batch, "cpu", EvidenceLosses(batch.evidence, [Watched("around", 2), Watched("exact", 1)])
        )
    assert torch.equal(plain, watched)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_heads_learn_to_look_at_the_evidence(model: LlamaForCausalLM, weight: float) -> None:
    before = _means(model)
    part = Part.choose(pack(CONTEXTS, block=True, weights=Weights()), 1.0, torch.Generator().manual_seed(0))
    optimizers = build_optimizers(model, "adamw", 1e-2)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(80):
            update(model, optimizers, [part], pool, "cpu", weight)
    after = _means(model)
    assert set(after) == {"around 2", "exact 2", "exact 3"}
    if weight:
        assert all(after[place] < 0.1 * before[place] for place in after)
    else:
        assert after["exact 2"] > 0.7 * before["exact 2"], "the answers' loss alone does not ask for it"
