"""What a policy's training is measured on: held-out prompts, the policy's choice against a random one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blockrag.budget import expand_at_rate
from blockrag.modeling.refrag.policy import ChunkPolicy
from blockrag.training.refrag.policy_baselines import random_scores
from blockrag.training.refrag.policy_contexts import CapturedContext, Masks, PolicyReader
from blockrag.training.refrag.policy_samples import Kind, PolicyContext


@dataclass(frozen=True)
class ProbeScore:
    """Nats per target token of one kind of target at one rate, means over held-out prompts."""

    kind: Kind
    rate: float
    """Passage tokens for each slot."""
    policy: float
    random: float
    gain: float
    """Random less policy: above 0 the policy chooses better."""
    error: float
    """Standard error of ``gain``, paired."""


@dataclass(frozen=True)
class PolicyScores:
    """Held-out scores of a policy, by kind of target and rate."""

    scores: tuple[ProbeScore, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicyScores:
        """Read what ``to_dict`` made."""
        return cls(tuple(ProbeScore(**score) for score in values["scores"]))


def measure_policy(
    policy: ChunkPolicy,
    reader: PolicyReader,
    probes: Sequence[PolicyContext],
    pool: ThreadPoolExecutor,
    rates: Sequence[float] = (),
) -> PolicyScores:
    """Score ``policy`` on prompts, each with one branch; ``rates`` default to half and a quarter of k.

    Blocks are read anew, so that nothing of them stays in memory.
    """
    k = reader.compressor.chunk_tokens
    wanted = tuple(rates) or tuple(rate for rate in (k / 4, k / 2) if rate > 1) or (1.0,)

    def score(item: tuple[int, PolicyContext]) -> np.ndarray:
        number, probe = item
        context = reader.capture(probe.instruction, probe.passages)
        seen = reader.see(context.passages, context.embeddings, probe.branches[0].prompt, probe.ranks[0])
        logits = policy.rate(seen)
        chance = random_scores(context.chunks, number)
        masks = [mask_at(context, scores, rate) for rate in wanted for scores in (logits, chance)]
        return reader.losses(context, probe.branches[0], np.stack(masks)).numpy().reshape(len(wanted), 2)

    losses = list(pool.map(score, enumerate(probes)))
    found = []
    for kind in dict.fromkeys(probe.kind for probe in probes):
        own = np.stack([loss for loss, probe in zip(losses, probes, strict=True) if probe.kind == kind])
        for place, rate in enumerate(wanted):
            policy_loss, random_loss = own[:, place, 0], own[:, place, 1]
            gain = random_loss - policy_loss
            found.append(
                ProbeScore(
                    kind=kind,
                    rate=rate,
                    policy=round(float(policy_loss.mean()), 4),
                    random=round(float(random_loss.mean()), 4),
                    gain=round(float(gain.mean()), 4),
                    error=round(float(gain.std() / len(gain) ** 0.5), 4),
                )
            )
    return PolicyScores(tuple(found))


def mask_at(context: CapturedContext, scores: np.ndarray, rate: float) -> Masks:
    """The mask [chunks] of the highest scores at a rate; everything compressed where the rate is k or beyond."""
    return expand_at_rate(scores, [len(passage) for passage in context.passages], context.chunk_tokens, rate)
