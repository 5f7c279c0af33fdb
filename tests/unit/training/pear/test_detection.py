from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.errors import InvalidRequestError
from blockrag.modeling.pear import attention_heads
from blockrag.modeling.stock_passes import additive_mask, block_mask
from blockrag.training.pear.detection import detect, rank_correlation
from blockrag.training.pear.passes import ProxyTask, forward, ordinary_tokens, prefill
from blockrag.training.pear.pear_config import PearConfig
from tests.models import make_tiny_model
from tests.unit.training.pear.models import KINDS, VOCAB, make_model

CANDIDATES = ordinary_tokens(VOCAB, range(3))
# with this seed no random model's π is near 0, which Δπ is relative to
FULL = PearConfig(mask="full", distractors=0, sizes=((5, 8), (3, 5)), seed=11)
BLOCK = replace(FULL, mask="block", distractors=2)


@pytest.mark.parametrize("later_heads", ["frozen", "live"])
@pytest.mark.parametrize("mean", ["batch", "sequence"])
@pytest.mark.parametrize(
    ("kind", "config"),
    # BLOOM takes no 4-D mask to compare with; how its blocks are computed is tested below
    [
        *[pytest.param(kind, FULL, id=f"{kind}-full") for kind in KINDS],
        *[pytest.param(kind, BLOCK, id=f"{kind}-block") for kind in KINDS if kind != "bloom"],
    ],
)
def test_equals_one_forward_pass_per_head(kind: str, config: PearConfig, mean: Any, later_heads: Any) -> None:
    model = make_model(kind)
    config = replace(config, mean=mean, later_heads=later_heads)

    found = detect(model, CANDIDATES, config)

    expected = naive(model, config)
    torch.testing.assert_close(found.delta_pi, expected, atol=1e-4, rtol=0)
    assert (expected.abs() > 1e-3).sum() >= 7, "every head matters, so a head left out would be seen"


def test_frozen_and_live_differ_below_the_last_layer_only() -> None:
    model = make_model("llama")
    frozen, live = (detect(model, CANDIDATES, replace(FULL, later_heads=kind)).delta_pi for kind in ("frozen", "live"))

    assert (frozen[0] - live[0]).abs().max() > 1e-2
    torch.testing.assert_close(frozen[1], live[1])


@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_little_memory_changes_nothing(kind: str) -> None:
    model = make_tiny_model("llama", vocab_size=VOCAB, num_hidden_layers=4) if kind == "llama" else make_model(kind)
    for later_heads in ("frozen", "live"):
        config = replace(BLOCK, later_heads=later_heads)
        whole = detect(model, CANDIDATES, config).delta_pi
        pieces = detect(model, CANDIDATES, replace(config, memory=5000 / 2**30)).delta_pi
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_leaves_the_model_as_it_was() -> None:
    model = make_model("bloom")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(tokens).logits
    detect(model, CANDIDATES, BLOCK)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in module.__dict__


def test_one_random_generator_decides() -> None:
    model = make_model("opt")
    again = detect(model, CANDIDATES, FULL)

    assert torch.equal(detect(model, CANDIDATES, FULL).delta_pi, again.delta_pi)
    assert not torch.equal(detect(model, CANDIDATES, replace(FULL, seed=4)).delta_pi, again.delta_pi)


def test_says_how_far_it_is() -> None:
    shares: list[float] = []
    detect(make_model("llama"), CANDIDATES, FULL, shares.append)

    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_refuses_prompts_longer_than_the_model() -> None:
    with pytest.raises(InvalidRequestError, match="90 tokens, where the model has 64 positions"):
        detect(make_model("gpt2"), CANDIDATES, replace(FULL, sizes=((2, 45),)))


def test_ranking() -> None:
    found = detect(make_model("llama"), CANDIDATES, FULL)
    layers, heads, values = zip(*found.ranked(), strict=True)

    assert list(values) == sorted(values, reverse=True)
    assert torch.equal(found.delta_pi[list(layers), list(heads)], torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 25.0, 90.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], -1.0),
        # Spearman's ρ with a tie, by hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
        ([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], 4.5 / (4.5 * 5.0) ** 0.5),
    ],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float) -> None:
    assert rank_correlation(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bloom"])
def test_blocks_without_a_mask(kind: str) -> None:
    model = make_model(kind)
    task = ProxyTask(6, "block", 2)
    tokens = task.draw(3, CANDIDATES, torch.Generator().manual_seed(1))
    *passages, copy = task.blocks(tokens)
    with torch.no_grad():
        got = forward(model, copy, prefill(model, passages), 18).logits

    torch.testing.assert_close(got, masked_logits(model, task, tokens)[:, 18:], atol=1e-4, rtol=1e-4)


def test_blocks_of_alibi_do_not_see_each_other() -> None:
    model = make_model("bloom")
    task = ProxyTask(6, "block", 2)
    tokens = task.draw(3, CANDIDATES, torch.Generator().manual_seed(1))
    *passages, copy = task.blocks(tokens)
    with torch.no_grad():
        cache = prefill(model, passages)
        alone = prefill(model, passages[1:2])
        one_block = forward(model, copy, prefill(model, [torch.cat(passages, dim=1)]), 18).logits
        plain = model(tokens).logits[:, 18:]

    torch.testing.assert_close(cache.layers[1].keys[:, :, 6:12], alone.layers[1].keys)
    torch.testing.assert_close(one_block, plain, atol=1e-4, rtol=1e-4)


def masked_logits(model: PreTrainedModel, task: ProxyTask, tokens: Tensor) -> Tensor:
    options: dict[str, Any] = {}
    if task.mask == "block":
        allowed = block_mask([task.n] * (task.distractors + 1), tokens.shape[1] - (task.distractors + 1) * task.n)
        whole = additive_mask(allowed, model.dtype).expand(len(tokens), -1, -1, -1)
        places = torch.arange(tokens.shape[1])
        near = places[:, None] - places < (getattr(model.config, "sliding_window", None) or tokens.shape[1])
        slides = "sliding_attention" in getattr(model.config, "layer_types", [])
        kinds = {"full_attention": whole, "sliding_attention": whole + additive_mask(near, model.dtype)}
        options["attention_mask"] = kinds if slides else whole
        options["position_ids"] = torch.arange(tokens.shape[1])[None]
    logits: Tensor = model(tokens, use_cache=False, **options).logits
    return logits


@torch.no_grad()
def naive(model: PreTrainedModel, config: PearConfig) -> Tensor:
    """As the paper writes it: one pass over the whole prompt per head, its contribution after W_O replaced."""
    heads = attention_heads(model)
    generator = torch.Generator().manual_seed(config.seed)
    changes = []
    for samples, n in config.sizes:
        task = ProxyTask(n, config.mask, config.distractors)
        tokens = task.draw(samples, CANDIDATES, generator)
        prompt, target = tokens[:, :-1], tokens[:, -1]

        def score(prompt: Tensor = prompt, target: Tensor = target, task: ProxyTask = task) -> float:
            logits = masked_logits(model, task, prompt)[:, -1].double()
            return float((logits.gather(1, target[:, None])[:, 0] - logits.mean(1)).mean())

        contributions, clean = clean_run(heads, score)
        change = torch.zeros(len(heads.layers), heads.num_heads, dtype=torch.float64)
        for layer in range(len(heads.layers)):
            for head in range(heads.num_heads):
                change[layer, head] = patched(heads, contributions, layer, head, config, score) / clean - 1
                if clean < 0:
                    change[layer, head] *= -1
        changes.append(change)
    return torch.stack(changes).mean(0)


def clean_run(heads: Any, score: Any) -> tuple[list[Tensor], float]:
    contributions: list[Tensor] = []
    with each_output(heads.outputs, lambda layer, z, _: contributions.append(parts(heads, layer, z))):
        return contributions, float(score())


def parts(heads: Any, layer: int, z: Tensor) -> Tensor:
    """Every head's contribution to the residual stream, bias left out: [samples, tokens, heads, width]."""
    module, found = heads.outputs[layer], []
    for head in range(heads.num_heads):
        alone = torch.zeros_like(z)
        span = slice(head * heads.head_dim, (head + 1) * heads.head_dim)
        alone[..., span] = z[..., span]
        found.append(module.forward(alone) - module.forward(torch.zeros_like(z)))
    return torch.stack(found, dim=2)


def patched(heads: Any, clean: list[Tensor], layer: int, head: int, config: PearConfig, score: Any) -> float:
    dimension = 0 if config.mean == "batch" else 1

    def hook(at: int, z: Tensor, out: Tensor) -> Tensor | None:
        if at < layer:
            return None
        out = out.clone()
        if at == layer:
            own = clean[layer][:, :, head]
            mean = own[:, -1].mean(0, keepdim=True) if dimension == 0 else own.mean(1)
            out[:, -1] += mean - own[:, -1]
        elif config.later_heads == "frozen":
            out[:, -1] += (clean[at] - parts(heads, at, z))[:, -1].sum(1)
        return out

    with each_output(heads.outputs, hook):
        return float(score())


@contextmanager
def each_output(modules: tuple[nn.Module, ...], function: Any) -> Iterator[None]:
    busy = False

    def make(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            nonlocal busy
            if busy:
                return None
            busy = True
            result = function(layer, args[0], out)
            busy = False
            return result

        return hook

    handles = [module.register_forward_hook(make(layer)) for layer, module in enumerate(modules)]
    yield
    for handle in handles:
        handle.remove()
