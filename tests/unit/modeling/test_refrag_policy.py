"""The policy over chunks: what it sees, what it gives, how chunks are drawn."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from blockrag.budget import chunk_bounds
from blockrag.errors import BundleError
from blockrag.modeling.refrag.policy import (
    ChunkPolicy,
    PolicyConfig,
    PolicyInput,
    draw,
    log_probabilities,
    make_policy_batch,
    make_policy_input,
    mask_of,
)
from blockrag.modeling.refrag.policy_features import FEATURES, PLACE_FEATURES, TokenTraits, chunk_features, policy_ranks
from tests.models import make_tiny_tokenizer

WIDTH = 12
NO_TRAITS = TokenTraits(np.zeros(300, dtype=np.bool_), np.zeros(300, dtype=np.bool_))


def _policy(query: bool, seed: int = 0) -> ChunkPolicy:
    torch.manual_seed(seed)
    policy = ChunkPolicy(PolicyConfig(WIDTH, query, width=16, heads=2, hidden=24))
    with torch.no_grad():
        policy.score.weight.normal_()
    return policy.eval()


def _prompt(chunks: int, question: int = 2, seed: int = 0) -> PolicyInput:
    generator = torch.Generator().manual_seed(seed)
    return PolicyInput(
        torch.randn(chunks, WIDTH, generator=generator),
        torch.rand(chunks, len(FEATURES), generator=generator),
        torch.randn(question, WIDTH, generator=generator),
    )


def _column(features: np.ndarray, name: str) -> list[float]:
    return [round(float(value), 4) for value in features[:, FEATURES.index(name)]]


def test_features_say_where_a_chunk_stands() -> None:
    features = chunk_features([[10, 11, 12, 13, 14], [15, 16]], [], 2, NO_TRAITS, ranks=[1, 0])
    assert features.shape == (4, len(FEATURES))
    assert _column(features, "inverse rank") == [0.5, 0.5, 0.5, 1.0]
    assert _column(features, "place") == [0.0, 0.5, 1.0, 0.0]
    assert _column(features, "last of its passage") == [0.0, 0.0, 1.0, 1.0]
    assert _column(features, "length") == [1.0, 1.0, 0.5, 1.0]
    assert not features[:, len(PLACE_FEATURES) :].any()


def test_overlap_counts_what_few_passages_hold() -> None:
    common, name = 50, 60
    passages = [[common, 1, 2, 3], [common, 4, name, 5], [common, 6, 7, 8]]
    features = chunk_features(passages, [common, name, common, 99], 2, NO_TRAITS)
    whole = _column(features, "passage's overlap")
    assert whole[2] == whole[3] == 1.0
    assert 0 < whole[0] < 0.2
    assert _column(features, "inverse rank by overlap") == [0.5, 0.5, 1.0, 1.0, 0.5, 0.5]
    own = _column(features, "chunk's overlap")
    assert own[3] > 0.8 > own[2] == own[0] > own[1] == 0.0
    assert _column(features, "overlap of the chunk after")[2] == own[3]
    assert _column(features, "overlap of the chunk before") == [0.0, own[0], 0.0, own[2], 0.0, own[4]]


def test_pairs_do_not_cross_passages() -> None:
    features = chunk_features([[7, 50], [60, 8], [50, 60]], [50, 60], 2, NO_TRAITS)
    assert _column(features, "passage's overlap in pairs of tokens") == [0.0, 0.0, 1.0]


def test_traits_of_tokens() -> None:
    tokenizer = make_tiny_tokenizer()
    traits = TokenTraits.of(tokenizer)
    for text, digit, capital in (("7", True, False), ("A", False, True), ("a", False, False), (" ", False, False)):
        (number,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (bool(traits.digit[number]), bool(traits.capital[number])) == (digit, capital), text
    seven = tokenizer("7", add_special_tokens=False)["input_ids"][0]
    # ids beyond the tokenizer's, which a padded embedding has, are no letters
    assert _column(chunk_features([[seven, 9999]], [], 2, traits), "digits") == [0.5]


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=30), max_size=6),
    st.lists(st.integers(0, 40), max_size=8),
    st.integers(1, 9),
)
def test_features_of_anything_are_small_numbers(passages: list[list[int]], question: list[int], k: int) -> None:
    features = chunk_features(passages, question, k, NO_TRAITS)
    assert len(features) == sum(len(chunk_bounds(len(passage), k)) for passage in passages)
    assert np.isfinite(features).all() and (features >= 0).all() and (features <= 2).all()


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_overlaps_are_those_counted_one_by_one(passages: list[list[int]], question: list[int], k: int) -> None:
    features = chunk_features(passages, question, k, NO_TRAITS)

    def rarity(holders: int) -> float:
        return math.log1p((len(passages) - holders + 0.5) / (holders + 0.5)) if holders else 0.0

    weights = {token: rarity(sum(token in passage for passage in passages)) for token in question}
    total = sum(weights.values())
    bounds = [chunk_bounds(len(passage), k) for passage in passages]
    owners = [place for place, own in enumerate(bounds) for _ in own]
    chunks = [set(passages[place][start:end]) for place, own in enumerate(bounds) for start, end in own]
    expected = [sum(weight for token, weight in weights.items() if token in chunk) for chunk in chunks]
    own = features[:, FEATURES.index("chunk's overlap")]
    np.testing.assert_allclose(own * total, expected, atol=1e-5)

    asked = list(itertools.pairwise(question))
    pairs = [set(itertools.pairwise(passage)) for passage in passages]
    scores = [sum(rarity(sum(pair in other for other in pairs)) for pair in asked if pair in here) for here in pairs]
    found = features[:, FEATURES.index("passage's overlap in pairs of tokens")]
    np.testing.assert_allclose(found * (max(scores) or 1.0), [scores[owner] for owner in owners], atol=1e-5)


def test_input_is_refused_where_it_does_not_fit() -> None:
    empty = torch.empty(0, WIDTH)
    with pytest.raises(ValueError, match="1 chunk embeddings for 2 chunks"):
        make_policy_input([[1, 2, 3]], [torch.zeros(1, WIDTH)], [], empty, chunk_tokens=2, traits=NO_TRAITS)
    with pytest.raises(ValueError, match="at least one token"):
        chunk_features([[1], []], [], 2, NO_TRAITS)
    with pytest.raises(ValueError, match="multiple of heads"):
        PolicyConfig(8, True, width=10, heads=3)
    none = make_policy_input([], [], [1], torch.zeros(1, WIDTH), chunk_tokens=2, traits=NO_TRAITS)
    assert _policy(query=True).rate(none).shape == (0,)


@pytest.mark.parametrize("query", [True, False])
def test_a_batch_gives_what_each_prompt_gives_alone(query: bool) -> None:
    policy = _policy(query)
    prompts = [_prompt(5, 2, 1), _prompt(9, 1, 2), _prompt(1, 3, 3)]
    logits = policy(make_policy_batch(prompts))
    for row, prompt in zip(logits.detach().numpy(), prompts, strict=True):
        np.testing.assert_allclose(row[: prompt.chunks], policy.rate(prompt), atol=1e-5)
        assert (row[prompt.chunks :] == -np.inf).all()


def test_only_the_query_policy_sees_the_question() -> None:
    prompt = _prompt(6)
    changed = PolicyInput(prompt.embeddings, prompt.features.clone(), prompt.question + 1.0)
    changed.features[:, len(PLACE_FEATURES) :] += 0.5
    assert np.array_equal(_policy(query=False).rate(prompt), _policy(query=False).rate(changed))
    assert not np.allclose(_policy(query=True).rate(prompt), _policy(query=True).rate(changed))
    # without a question it still rates
    silent = PolicyInput(prompt.embeddings, prompt.features, prompt.question[:0])
    assert np.isfinite(_policy(query=True).rate(silent)).all()


def test_an_untrained_policy_draws_at_random() -> None:
    assert not ChunkPolicy(PolicyConfig(WIDTH, query=True)).rate(_prompt(7)).any()


@pytest.mark.parametrize("query", [True, False])
def test_saved_and_loaded(query: bool, tmp_path: Path) -> None:
    policy = _policy(query)
    policy.save(tmp_path / "policy.safetensors")
    loaded = ChunkPolicy.load(tmp_path / "policy.safetensors")
    assert loaded.config == policy.config
    for chunks in (5, 200):  # short and long inputs go through other kernels
        np.testing.assert_allclose(loaded.rate(_prompt(chunks)), policy.rate(_prompt(chunks)), atol=1e-5)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    with pytest.raises(BundleError, match="no policy"):
        ChunkPolicy.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(BundleError, match="no policy"):
        ChunkPolicy.load(path)
    _policy(query=True).save(path)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(BundleError, match="no policy"):
        ChunkPolicy.load(path)
    broken = _policy(query=True)
    with torch.no_grad():
        broken.embed.weight[0, 0] = float("nan")
    broken.save(path)
    with pytest.raises(BundleError, match=r"NaN or infinity in embed\.weight"):
        ChunkPolicy.load(path)


def test_a_policy_that_does_not_see_the_question_is_ranked_by_the_prompt_alone() -> None:
    assert policy_ranks(True, [2, 0, 1]) == (2, 0, 1)
    assert policy_ranks(False, [2, 0, 1]) == (2, 1, 0)


def test_draws_come_from_the_sequential_distribution() -> None:
    """The frequency of every ordered pair equals the product of softmax probabilities over what is left."""
    logits = torch.tensor([1.0, 0.0, -0.5, 0.8])
    count = 40_000
    drawn = draw(logits, 2, count, torch.Generator().manual_seed(0))
    found = Counter(map(tuple, drawn.tolist()))
    weights = logits.exp()
    for first, second in permutations(range(4), 2):
        expected = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        assert found[first, second] / count == pytest.approx(float(expected), abs=0.01)
        ours = log_probabilities(logits, torch.tensor([[first, second]]))
        assert float(ours.sum().exp()) == pytest.approx(float(expected), rel=1e-4)


def test_log_probability_of_drawing_everything() -> None:
    logits = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    found = log_probabilities(logits, torch.tensor([[2, 0, 1]]))
    assert float(found[0, -1].detach()) == pytest.approx(0.0, abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
    with pytest.raises(ValueError, match="4 chunks of 3"):
        draw(logits, 4, 1)


def test_masks_of_draws() -> None:
    masks = mask_of(torch.tensor([[2, 0], [1, 3]]), 4)
    assert masks.tolist() == [[True, False, True, False], [False, True, False, True]]
