"""Training a chunk policy with a frozen reader: ``train_policy``.

Behind ``blockrag adapt refrag policy``. Decoder, chunk encoder and projector do not change; the bundle gets a
policy beside them. Several workers share the contexts of a step, whose reading is what a step costs; the policy is
small, and every worker has it whole.

For every prompt a group of expansions is drawn from the policy (chunks one after another without replacement), the
frozen decoder reads the target under each composed prompt, and the reward is minus the target's loss. Rewards are
normalised within the group, and the policy is moved with PPO's clipped objective, draw by draw, without a KL term.

Source: REFRAG (arXiv 2509.01092, section on selective compression); group-normalised advantages as in GRPO (arXiv
2402.03300, equation 3); clipping as in PPO (arXiv 1707.06347, equation 7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockrag.errors import SetupError
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.refrag.policy import (
    ChunkPolicy,
    PolicyConfig,
    PolicyInput,
    draw,
    log_probabilities,
    make_policy_batch,
    mask_of,
)
from blockrag.modeling.refrag.refrag_writing import PolicyPart, write_refrag
from blockrag.training.configuring import in_bfloat16
from blockrag.training.loop import Schedule, StepResult, train
from blockrag.training.refrag.policy_reader import CapturedContext, PolicyReader
from blockrag.training.refrag.policy_samples import PolicyContext, PolicyData, answer_target, load_policy_data
from blockrag.training.refrag.stage_config import POLICY_HEAD, PolicyTrainingConfig, PpoSettings
from blockrag.training.run import OnProgress, RunFolder, Scores
from blockrag.training.workers import Workers, take_step


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


def prepare_policy(config: PolicyTrainingConfig, workers: int = 1) -> Bundle:
    """Check the bundle and ``out`` before anything heavy is loaded. Raises SetupError or BundleError."""
    if config.out.exists():
        raise SetupError(f"{config.out}: exists already")
    bundle = load_bundle(config.bundle, verify_files=False)
    bundle.compression()  # or it says that there is none
    return bundle


def train_policy(
    config: PolicyTrainingConfig, workers: Workers | None = None, on_progress: OnProgress | None = None
) -> Path:
    """Train until the budget is used up, or continue a run that was stopped; returns the bundle with the policy.

    Every worker calls it. Raises SetupError for data that is missing, a run of another recipe in ``run_dir`` or an
    ``out`` that exists, BundleError for a bundle without chunk compression.
    """
    workers = workers or Workers(config.device)
    bundle = prepare_policy(config)
    reader = PolicyReader.load(bundle, workers.device, bf16=in_bfloat16(config.precision, workers.device.type))
    data = load_policy_data(config, bundle)
    torch.manual_seed(config.seed)
    policy = ChunkPolicy(sizes_of(config, reader.compressor.encoder_width)).to(workers.device)
    if config.start_from is not None:
        before = ChunkPolicy.load(config.start_from)
        if before.config != policy.config:
            raise SetupError(f"{config.start_from}: {before.config}, where {policy.config} is to be trained")
        policy.load_state_dict(before.state_dict())
    run = RunFolder(config.run_dir, workers)
    identity = {"kind": "policy", "recipe": config.recipe(), "bundle": bundle.policy_basis, "data": data.digests}
    with run.opened(identity), _pool(config, workers) as pool:
        learner = _Learner(config, reader, policy, data, workers, pool)
        state = train(learner, Schedule.of(config), run, workers, on_progress)
        if workers.rank == 0:
            facts = {
                "recipe": config.recipe(),
                "steps": state.step,
                "seconds": round(state.seconds),
                "draws": state.tokens,
                "data": data.digests,
                "held_out": run.scores(),
            }
            _write(bundle, config, policy, facts)
            run.drop_checkpoints()
        workers.barrier()
    return config.out


def sizes_of(config: PolicyTrainingConfig, encoder_width: int) -> PolicyConfig:
    """Of the policy to train."""
    width = config.policy_width
    return PolicyConfig(encoder_width, config.query, width=width, heads=width // POLICY_HEAD, hidden=2 * width)


@dataclass(frozen=True)
class _Drawn:
    """Contexts of a step, to imitate or to draw for."""

    step: int
    contexts: Sequence[PolicyContext]
    imitated: bool


@dataclass
class _Learner:
    """What ``train`` trains: a policy, the reader frozen. Its work is counted in compositions that are read."""

    config: PolicyTrainingConfig
    reader: PolicyReader
    model: ChunkPolicy
    data: PolicyData
    workers: Workers
    pool: ThreadPoolExecutor

    def __post_init__(self) -> None:
        # no weight decay: the few steps do not overfit draws that are made anew each time
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.learning_rate, weight_decay=0.0)
        self.optimizers = [self._optimizer]

    def draw(self, step: int, fraction: float) -> _Drawn:
        samples = self.data.samples
        if fraction < self.config.chosen_imitation and samples.rows is not None:
            return _Drawn(step, samples.questions(step, self.config.imitation_contexts), True)
        return _Drawn(step, samples.step(step, self.config.contexts), False)

    def step(self, samples: _Drawn, factor: float) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        result = self._imitate(samples.contexts) if samples.imitated else self._update(samples.step, samples.contexts)
        if self.workers.size > 1:  # all go on with the first one's policy: what devices round otherwise does not add up
            with torch.no_grad():
                for parameter in self.model.parameters():
                    own = parameter if self.workers.rank == 0 else torch.zeros_like(parameter)
                    parameter.copy_(self.workers.sum(own).to(parameter))
        return result

    def _imitate(self, contexts: Sequence[PolicyContext]) -> StepResult:
        """Does nothing where no answer of the contexts stands in a passage."""
        reader = self.reader
        embedded = list(self.pool.map(lambda one: reader.compressor.embed(one.passages), contexts))
        prompts, targets = [], []
        for context, embeddings in zip(contexts, embedded, strict=True):
            for branch, ranks in zip(context.branches, context.ranks, strict=True):
                target = answer_target(context, branch, reader.compressor.chunk_tokens)
                if target is not None:
                    prompts.append(reader.see(context.passages, embeddings, branch.prompt, ranks))
                    targets.append(torch.from_numpy(target).to(self.workers.device))
        if not prompts:
            return StepResult({}, 0.0, 0)
        return imitate(self.model, self._optimizer, prompts, targets)

    def _update(self, step: int, contexts: Sequence[PolicyContext]) -> StepResult:
        config, reader = self.config, self.reader
        mine = range(self.workers.rank, len(contexts), self.workers.size)
        reading = self.pool.map(lambda n: reader.capture(contexts[n].instruction, contexts[n].passages), mine)
        captured = dict(zip(mine, reading, strict=True))
        asked = [(number, place) for number, one in enumerate(contexts) for place in range(len(one.branches))]
        # chunk embeddings of what others read cost little
        embeddings = [
            captured[number].embeddings if number in captured else reader.compressor.embed(one.passages)
            for number, one in enumerate(contexts)
        ]
        prompts = [
            reader.see(
                contexts[n].passages, embeddings[n], contexts[n].branches[place].prompt, contexts[n].ranks[place]
            )
            for n, place in asked
        ]
        self.model.train(False)
        # every worker draws for all contexts, so that all draw the same, and reads its own
        groups = draw_groups(self.model, prompts, config.ppo, Random(f"{config.seed}/draws/{step}"))
        jobs = [
            (row, captured[n], contexts[n], place, group)
            for row, ((n, place), group) in enumerate(zip(asked, groups, strict=True))
            if n in captured
        ]
        losses = torch.zeros(len(groups), config.ppo.draws)
        for job, found in zip(jobs, self.pool.map(self._losses, jobs), strict=True):
            losses[job[0]] = found
        losses = self.workers.sum(losses).float()
        return update(self.model, self._optimizer, groups, losses.to(self.workers.device), config.ppo)

    def _losses(self, job: tuple[int, CapturedContext, PolicyContext, int, Group]) -> Tensor:
        _, captured, context, place, group = job
        diverging = context.kind == "text" and self.config.text_reward == "divergence"
        measured = self.reader.divergences if diverging else self.reader.losses
        return measured(captured, context.branches[place], group.masks.cpu().numpy())

    def measure(self) -> Scores:
        self.model.train(False)
        return measure_policy(self.model, self.reader, self.data.probes, self.pool)


def _pool(config: PolicyTrainingConfig, workers: Workers) -> ThreadPoolExecutor:
    """Threads with a core each; one on a GPU, and for one worker of several."""
    count = config.threads if workers.device.type == "cpu" and workers.size == 1 else 1
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def _write(bundle: Bundle, config: PolicyTrainingConfig, policy: ChunkPolicy, facts: Mapping[str, Any]) -> None:
    """``bundle`` with the policy beside those it has."""
    kept = {
        name: PolicyPart(ChunkPolicy.load(bundle.path / record.file), record.facts, record.basis)
        for name, record in bundle.compression().policies.items()
    }
    trained = PolicyPart(policy, facts, bundle.policy_basis)
    write_refrag(bundle, config.out, policies={**kept, config.policy_name: trained})


def measure_policy(
    policy: ChunkPolicy,
    reader: PolicyReader,
    probes: Sequence[PolicyContext],
    pool: ThreadPoolExecutor,
) -> dict[str, dict[str, float]]:
    """Nats per target token after the policy's choice and after a random one, by kind of target and rate.

    ``gain`` is random less policy (above 0 the policy chooses better) and ``error`` its standard error, paired. Each
    of ``probes`` has one branch; the rates, passage tokens for each slot, are half and a quarter of k. Blocks are read
    anew, so that nothing of them stays in memory.
    """
    k = reader.compressor.chunk_tokens
    wanted = tuple(rate for rate in (k / 4, k / 2) if rate > 1) or (1.0,)

    def score(item: tuple[int, PolicyContext]) -> np.ndarray:
        number, probe = item
        context = reader.capture(probe.instruction, probe.passages)
        seen = reader.see(context.passages, context.embeddings, probe.branches[0].prompt, probe.ranks[0])
        logits = policy.rate(seen)
        chance = np.random.default_rng(number).permutation(context.chunks).astype(np.float32)
        masks = [context.mask_at(scores, rate) for rate in wanted for scores in (logits, chance)]
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
