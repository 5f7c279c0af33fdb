"""Learning a chunk policy: the clipped objective, and planted tasks where one chunk holds the answer."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from blockrag.errors import SetupError
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyConfig, PolicyInput
from blockrag.modeling.refrag.policy_features import FEATURES
from blockrag.training.refrag.policy_stage import (
    Group,
    advantages,
    clipped_objective,
    draw_fraction,
    draw_groups,
    imitate,
    update,
)
from blockrag.training.refrag.stage_config import PpoSettings

WIDTH = 16


def _planted(query: bool, seed: int, prompts: int) -> list[tuple[PolicyInput, int]]:
    """Prompts of 24 chunks, one of which holds the answer: marked by a direction, or by likeness to the question."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(prompts):
        embeddings = torch.randn(24, WIDTH, generator=generator)
        question = torch.randn(1, WIDTH, generator=generator)
        place = int(torch.randint(24, (1,), generator=generator))
        if query:
            embeddings[place] = question[0] + 0.3 * torch.randn(WIDTH, generator=generator)
        else:
            embeddings[place, 0] += 4.0
        made.append((PolicyInput(embeddings, torch.zeros(24, len(FEATURES)), question), place))
    return made


@pytest.mark.parametrize("query", [True, False])
def test_a_planted_answer_is_found(query: bool) -> None:
    """The target costs 3 nats, 0.2 where its chunk is expanded; nothing else says which chunk it is."""
    torch.manual_seed(0)
    policy = ChunkPolicy(PolicyConfig(WIDTH, query, width=32, heads=2, hidden=32))
    settings = PpoSettings()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    rewards = []
    for step in range(150):
        planted = _planted(query, step, 12)
        groups = draw_groups(policy, [prompt for prompt, _ in planted], settings, Random(step))
        held = [group.masks[:, place] for group, (_, place) in zip(groups, planted, strict=True)]
        losses = torch.where(torch.stack(held), 0.2, 3.0)
        rewards.append(update(policy, optimizer, groups, losses, settings).further["reward"])
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.8
    # greedily, two chunks of 24: at random the answer's is among them in one of twelve prompts
    unseen = _planted(query, 10_000, 60)
    found = [place in np.argsort(-policy.rate(prompt))[:2] for prompt, place in unseen]
    assert np.mean(found) > 0.5


def test_imitation_learns_what_it_is_shown() -> None:
    torch.manual_seed(0)
    policy = ChunkPolicy(PolicyConfig(WIDTH, query=True, width=32, heads=2, hidden=32))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    stats = []
    for step in range(80):
        planted = _planted(True, step, 12)
        targets = [torch.nn.functional.one_hot(torch.tensor(place), 24).float() for _, place in planted]
        stats.append(imitate(policy, optimizer, [prompt for prompt, _ in planted], targets))
    assert stats[0].losses["imitation"] == pytest.approx(np.log(24), abs=0.01) and stats[-1].losses["imitation"] < 2.0
    assert np.mean([one.further["first"] for one in stats[-10:]]) > 0.5


def test_advantages_are_those_of_a_group() -> None:
    found = advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), least_spread=1e-6)
    assert found[0].tolist() == pytest.approx([1.2247, 0.0, -1.2247], abs=1e-3)
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    # where hardly anything differs, hardly anything is learnt
    assert advantages(torch.tensor([[1.0, 1.0001]]), least_spread=0.02).abs().max() < 0.01


def test_the_objective_is_clipped() -> None:
    """What a draw gains by becoming likelier ends at the clip range; what it loses does not."""
    prompt = PolicyInput(torch.zeros(3, 2), torch.zeros(3, len(FEATURES)), torch.zeros(0, 2))
    drawn = torch.tensor([[0]])
    group = Group(prompt, drawn, torch.full((1, 1), -np.log(3.0)))
    same = torch.zeros(3)
    loss, ratio = clipped_objective(same, group, torch.tensor([1.0]), clip=0.2)
    assert float(ratio) == pytest.approx(1.0) and float(loss) == pytest.approx(-1.0)
    for advantage, moves in ((1.0, False), (-1.0, True)):
        logits = torch.tensor([2.0, 0.0, 0.0], requires_grad=True)
        loss, ratio = clipped_objective(logits, group, torch.tensor([advantage]), clip=0.2)
        assert float(ratio) > 1.2
        loss.backward()
        assert logits.grad is not None and bool(logits.grad.abs().sum() > 0) is moves


def test_groups_are_drawn_again_alike() -> None:
    policy = ChunkPolicy(PolicyConfig(WIDTH, query=True, width=16, heads=2, hidden=16))
    prompts = [prompt for prompt, _ in _planted(True, 0, 3)]
    one, other = (draw_groups(policy, prompts, PpoSettings(), Random(5)) for _ in range(2))
    assert all(torch.equal(a.drawn, b.drawn) for a, b in zip(one, other, strict=True))
    assert all(group.masks.sum(1).tolist() == [group.drawn.shape[1]] * 8 for group in one)


def test_fractions_stay_in_their_range() -> None:
    settings = PpoSettings(fractions=(0.1, 0.4))
    drawn = [draw_fraction(settings, Random(number)) for number in range(200)]
    assert 0.1 <= min(drawn) < 0.13 and 0.35 < max(drawn) <= 0.4
    for wrong in ((0.0, 0.5), (0.5, 0.2), (0.5, 1.2)):
        with pytest.raises(SetupError, match="fractions"):
            PpoSettings(fractions=wrong)
    with pytest.raises(SetupError, match="two draws"):
        PpoSettings(draws=1)
