"""What a policy's training is measured on: held-out prompts, the policy's choice against a random one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from blockrag.budget import expand_at_rate
from blockrag.modeling.refrag.policy import ChunkPolicy
from blockrag.training.refrag.policy_baselines import random_scores
from blockrag.training.refrag.policy_contexts import CapturedContext, Masks, PolicyReader
from blockrag.training.refrag.policy_samples import PolicyContext


def measure_policy(
    policy: ChunkPolicy,
    reader: PolicyReader,
    probes: Sequence[PolicyContext],
    pool: ThreadPoolExecutor,
    rates: Sequence[float] = (),
) -> dict[str, dict[str, float]]:
    """Nats per target token after the policy's choice and after a random one, by kind of target and rate.

    ``gain`` is random less policy (above 0 the policy chooses better) and ``error`` its standard error, paired. Each
    of ``probes`` has one branch; ``rates``, passage tokens for each slot, default to half and a quarter of k.

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
    found: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(probe.kind for probe in probes):
        own = np.stack([loss for loss, probe in zip(losses, probes, strict=True) if probe.kind == kind])
        for place, rate in enumerate(wanted):
            policy_loss, random_loss = own[:, place, 0], own[:, place, 1]
            gain = random_loss - policy_loss
            values = {
                "policy": policy_loss.mean(),
                "random": random_loss.mean(),
                "gain": gain.mean(),
                "error": gain.std() / len(gain) ** 0.5,
            }
            found[f"{kind} at rate {rate:g}"] = {name: round(float(value), 4) for name, value in values.items()}
    return found


def mask_at(context: CapturedContext, scores: np.ndarray, rate: float) -> Masks:
    """The mask [chunks] of the highest scores at a rate; everything compressed where the rate is k or beyond."""
    return expand_at_rate(scores, [len(passage) for passage in context.passages], context.chunk_tokens, rate)
