"""Reinforcement learning of a chunk policy: draws, advantages, the clipped objective.

For every prompt a group of expansions is drawn from the policy (chunks one after another without replacement), the
frozen decoder reads the target under each composed prompt, and the reward is minus the target's loss. Rewards are
normalised within the group, and the policy is moved with PPO's clipped objective, draw by draw, without a KL term.

Source: REFRAG (arXiv 2509.01092, section on selective compression); group-normalised advantages as in GRPO (arXiv
2402.03300, equation 3); clipping as in PPO (arXiv 1707.06347, equation 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from blockrag.modeling.refrag.policy import (
    ChunkPolicy,
    PolicyInput,
    draw,
    log_probabilities,
    make_policy_batch,
    mask_of,
)
from blockrag.training.loop import StepResult
from blockrag.training.refrag.policy_config import PpoSettings
from blockrag.training.workers import take_step


@dataclass(frozen=True)
class Group:
    """Expansions drawn for one prompt."""

    prompt: PolicyInput
    drawn: Tensor
    """Chunks in the order drawn, int64 [draws, count]."""
    log_probabilities: Tensor
    """Of each draw when it was drawn, [draws, count]."""

    @property
    def masks(self) -> Tensor:
        """bool [draws, chunks]"""
        return mask_of(self.drawn, self.prompt.chunks)


def draw_fraction(settings: PpoSettings, random: Random) -> float:
    """A share of chunks to expand, its logarithm uniform."""
    low, high = settings.fractions
    return math.exp(random.uniform(math.log(low), math.log(high)))


@torch.no_grad()
def draw_groups(
    policy: ChunkPolicy, prompts: Sequence[PolicyInput], settings: PpoSettings, random: Random
) -> list[Group]:
    """A group for each prompt; the same for equal ``random``."""
    logits = policy(make_policy_batch(prompts))
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    groups = []
    for prompt, row in zip(prompts, logits, strict=True):
        own = row[: prompt.chunks]
        count = max(1, round(draw_fraction(settings, random) * prompt.chunks))
        drawn = draw(own, count, settings.draws, generator)
        groups.append(Group(prompt, drawn, log_probabilities(own, drawn)))
    return groups


def advantages(losses: Tensor, least_spread: float) -> Tensor:
    """Rewards normalised within each group: ``losses`` [groups, draws], nats per target token; same shape."""
    rewards = -losses
    spread = rewards.std(dim=1, keepdim=True, correction=0)
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + least_spread)


def clipped_objective(logits: Tensor, group: Group, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """What is minimised for one group, a scalar, and the ratios, [draws, count].

    ``logits`` [chunks] carry gradients; ``advantage`` [draws].
    """
    ratio = torch.exp(log_probabilities(logits, group.drawn) - group.log_probabilities)
    gain = ratio * advantage.unsqueeze(1)
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantage.unsqueeze(1)
    return -torch.minimum(gain, bounded).mean(), ratio.detach()


def imitate(
    policy: ChunkPolicy,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[PolicyInput],
    targets: Sequence[Tensor],
) -> StepResult:
    """Move the first draw towards ``targets``, distributions over each prompt's chunks, [chunks] each.

    Cross-entropy. It needs no decoder, and a policy that starts from it seldom draws what cannot matter. Further is
    ``first``, the share of prompts whose likeliest chunk holds the answer.
    """
    logits = policy(make_policy_batch(prompts))
    losses = [
        -(target * torch.log_softmax(row[: prompt.chunks], dim=0)).sum()
        for row, prompt, target in zip(logits, prompts, targets, strict=True)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = _move(policy, optimizer)
    likeliest = [
        float(target[row[: prompt.chunks].argmax()] == target.max())
        for row, prompt, target in zip(logits.detach(), prompts, targets, strict=True)
    ]
    return StepResult({"imitation": float(loss.detach())}, norm, 0, {"first": sum(likeliest) / len(likeliest)})


def _move(policy: ChunkPolicy, optimizer: torch.optim.Optimizer) -> float:
    return take_step(list(policy.parameters()), [(optimizer, optimizer.param_groups[0]["lr"])])


def update(
    policy: ChunkPolicy,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    losses: Tensor,
    settings: PpoSettings,
) -> StepResult:
    """Move the policy by the draws of ``groups``, whose target losses are ``losses`` [groups, draws].

    Further are ``reward``, the mean over draws of minus nats per target token (or minus the divergence where that is
    the reward); ``spread``, its standard deviation within a group, mean over groups: 0 where no choice mattered; and
    ``clipped``, the share of draws whose ratio was outside of the clip range in the last epoch.
    """
    gains = advantages(losses, settings.least_spread)
    batch = make_policy_batch([group.prompt for group in groups])
    norms, outside = [], 0.0
    for _ in range(settings.epochs):
        logits = policy(batch)
        objectives, ratios = zip(
            *(
                clipped_objective(row[: group.prompt.chunks], group, gain, settings.clip)
                for row, group, gain in zip(logits, groups, gains, strict=True)
            ),
            strict=True,
        )
        torch.stack(objectives).mean().backward()
        norms.append(_move(policy, optimizer))
        moved = torch.cat([(ratio - 1).abs().flatten() for ratio in ratios])
        outside = float((moved > settings.clip).float().mean())
    spread = float(losses.std(dim=1, correction=0).mean())
    further = {"reward": -float(losses.mean()), "spread": spread, "clipped": outside}
    return StepResult({}, sum(norms) / len(norms), losses.numel(), further)
