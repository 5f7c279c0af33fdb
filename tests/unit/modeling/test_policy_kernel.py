"""Policies on the compiled kernel against what they stand for: written in torch, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockrag.modeling.native import kernels as native
from blockrag.modeling.refrag import policy_kernel
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyConfig, PolicyInput, make_policy_batch
from blockrag.modeling.refrag.policy_features import FEATURES
from blockrag.modeling.refrag.policy_kernel import CompiledPolicy, compile_policy

COMPILED = native.kernels()
pytestmark = pytest.mark.skipif(COMPILED is None, reason="no compiled kernels on this machine")

SHIPPED = PolicyConfig(256, query=True, width=64, layers=2, heads=2, hidden=128)
SIZES = [
    SHIPPED,
    replace(SHIPPED, query=False),
    PolicyConfig(16, query=True),
    PolicyConfig(48, query=True, width=64, layers=1, heads=1, hidden=32),
    PolicyConfig(32, query=False, width=128, layers=3, heads=2, hidden=96),
]


def made_policy(config: PolicyConfig, seed: int = 0) -> ChunkPolicy:
    """Nothing in it is zero or one, as it is before training."""
    torch.manual_seed(seed)
    policy = ChunkPolicy(config).eval()
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(torch.randn_like(weights), alpha=0.1)
    return policy


def compiled(policy: ChunkPolicy) -> CompiledPolicy:
    found = compile_policy(policy)
    assert found is not None
    return found


def made_prompt(counts: list[int], asked: int, width: int, seed: int = 0) -> tuple[list[Tensor], np.ndarray, Tensor]:
    source = torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(count, width, generator=source) for count in counts]
    features = torch.rand(sum(counts), len(FEATURES), generator=source)
    return embeddings, features.numpy(), torch.randn(asked, width, generator=source)


def reference(policy: ChunkPolicy, embeddings: list[Tensor], features: np.ndarray, question: Tensor) -> np.ndarray:
    exact = ChunkPolicy(policy.config)
    exact.load_state_dict(policy.state_dict())
    exact.double().eval()
    prompt = PolicyInput(torch.cat(embeddings).double(), torch.from_numpy(features).double(), question.double())
    with torch.no_grad():
        return exact(make_policy_batch([prompt]))[0].numpy()  # type: ignore[no-any-return]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 2e-5 of the largest logit: float32 on both sides differs by a fifth of that."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize(
    ("counts", "asked"), [([1], 0), ([16] * 20, 20), ([7, 1, 30, 3], 5), ([31], 1), ([40] * 20, 9)]
)
def test_logits(config: PolicyConfig, counts: list[int], asked: int) -> None:
    policy = made_policy(config)
    prompt = made_prompt(counts, asked if config.query else 0, config.encoder_width)
    assert_close(compiled(policy).rate(*prompt), reference(policy, *prompt))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.integers(0, 40), st.integers(0, 9))
def test_logits_of_any_number_of_chunks(counts: list[int], asked: int, seed: int) -> None:
    policy = made_policy(PolicyConfig(16, query=True, width=64, layers=2, heads=2, hidden=64), seed)
    prompt = made_prompt(counts, asked, 16, seed)
    assert_close(compiled(policy).rate(*prompt), reference(policy, *prompt))


def test_large_scores() -> None:
    """Where the exponentials of all but a few keys vanish, and would overflow without the largest subtracted."""
    policy = made_policy(SHIPPED)
    with torch.no_grad():
        for layer in policy.layers:
            layer.attention.weight.mul_(10)  # type: ignore[operator, union-attr]
    prompt = made_prompt([16] * 10, 4, SHIPPED.encoder_width)
    found, expected = compiled(policy).rate(*prompt), reference(policy, *prompt)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_same_prompt_gives_the_same_logits_whatever_memory_held_before() -> None:
    kernel = compiled(made_policy(SHIPPED))
    prompt = made_prompt([16, 13], 3, SHIPPED.encoder_width)
    before = kernel.rate(*prompt)
    kernel.rate(*made_prompt([50], 9, SHIPPED.encoder_width, seed=1))
    assert np.array_equal(kernel.rate(*prompt), before)


def test_not_a_number_stays_none() -> None:
    embeddings, features, question = made_prompt([9, 9], 3, SHIPPED.encoder_width)
    embeddings[1][4, 7] = float("nan")
    assert np.isnan(compiled(made_policy(SHIPPED)).rate(embeddings, features, question)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own, seen, asked: (own[:1], seen, asked), "9 chunk embeddings for features 14 x 18"),
        (lambda own, seen, asked: (own, np.ascontiguousarray(seen[:, :6]), asked), "features 14 x 6"),
        (lambda own, seen, asked: (own, seen, asked[:, :16]), "for a policy of 256"),
        (lambda own, seen, asked: ([own[0][:, :16], own[1]], seen, asked), "for a policy of 256"),
        (lambda own, seen, asked: ([own[0].double(), own[1]], seen, asked), "float64"),
        (lambda own, seen, asked: (own, seen.astype(np.float64), asked), "float64"),
        (lambda own, seen, asked: (own, seen, asked.t().contiguous().t()), "packed"),
        (lambda own, seen, asked: (own, np.asfortranarray(seen), asked), "packed"),
    ],
)
def test_what_does_not_fit_is_refused(change: object, message: str) -> None:
    prompt = made_prompt([9, 5], 3, SHIPPED.encoder_width)
    with pytest.raises(ValueError, match=message):
        compiled(made_policy(SHIPPED)).rate(*change(*prompt))  # type: ignore[operator]


@pytest.mark.parametrize(
    "sizes", [{"width": 96, "heads": 2}, {"hidden": 24}, {"encoder_width": 12}, {"width": 64, "heads": 4}]
)
def test_other_sizes_are_left_to_torch(sizes: dict[str, Any]) -> None:
    policy = made_policy(replace(SHIPPED, **sizes))
    assert compile_policy(policy) is None
    assert COMPILED is not None
    with pytest.raises(ValueError, match="multiples"):
        CompiledPolicy(policy, COMPILED)


def test_other_machines_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_kernel, "kernels", lambda: None)
    assert compile_policy(made_policy(SHIPPED)) is None
