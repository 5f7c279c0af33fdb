"""Training a chunk policy with a frozen reader: ``train_policy``.

Behind ``blockrag adapt refrag policy``. Decoder, chunk encoder and projector do not change; the bundle gets a
policy beside them. Several workers share the contexts of a step, whose reading is what a step costs; the policy is
small, and every worker has it whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from blockrag.errors import BundleError, SetupError
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyInput
from blockrag.modeling.refrag.writing import PolicyPart, write_refrag
from blockrag.training.adaptation.run import METRICS, RunFolder, RunState
from blockrag.training.adaptation.workers import OneWorker, Workers
from blockrag.training.optimizer import learning_rate_factor
from blockrag.training.refrag.policy import Group, ImitationStats, UpdateStats, draw_groups, imitate, update
from blockrag.training.refrag.policy_config import PolicyTrainingConfig
from blockrag.training.refrag.policy_contexts import CapturedContext, PolicyReader
from blockrag.training.refrag.policy_data import PolicyData, load_policy_data
from blockrag.training.refrag.policy_metrics import PolicyMetrics
from blockrag.training.refrag.policy_probes import PolicyScores, measure_policy
from blockrag.training.refrag.policy_samples import PolicyContext, answer_target


def prepare_policy(config: PolicyTrainingConfig) -> Bundle:
    """Check the bundle and ``out`` before anything heavy is loaded. Raises SetupError or BundleError."""
    if config.out.exists():
        raise SetupError(f"{config.out}: exists already")
    bundle = load_bundle(config.bundle, verify_files=False)
    if bundle.refrag is None:
        raise BundleError(f"{bundle.path}: the bundle has no chunk compression (refrag)")
    return bundle


def train_policy(
    config: PolicyTrainingConfig,
    on_progress: Callable[[PolicyMetrics], None] = lambda _metrics: None,
    workers: Workers | None = None,
) -> Path:
    """Train until the budget is used up, or continue a run that was stopped; returns the bundle with the policy.

    Every worker calls it. Raises SetupError for data that is missing, a run of another recipe in ``run_dir`` or an
    ``out`` that exists, BundleError for a bundle without chunk compression.
    """
    workers = workers or OneWorker(config.device)
    bundle = prepare_policy(config)
    reader = PolicyReader.load(bundle, workers.device, bf16=config.precision == "bf16")
    data = load_policy_data(config, bundle)
    torch.manual_seed(config.seed)
    policy = ChunkPolicy(config.sizes(reader.compressor.encoder_width)).to(workers.device)
    if config.start_from is not None:
        _start(policy, config.start_from)
    # no weight decay: the few steps do not overfit draws that are made anew each time
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    folder = RunFolder(config.run_dir, workers)
    identity = {**config.recipe(), "bundle": bundle.policy_basis, "data": data.digests}
    with folder.opened(identity), _pool(config, workers) as pool:
        run = _Run(config, reader, policy, optimizer, data, folder, workers, pool, on_progress)
        state, scores = run.train()
        facts = {
            "recipe": config.recipe(),
            "steps": state.step,
            "seconds": round(state.seconds),
            "draws": state.tokens,
            "data": data.digests,
            "held_out": {"before": run.first_scores, "after": scores.to_dict()},
        }
        if workers.rank == 0:
            _write(bundle, config, policy, facts)
            folder.drop_checkpoints()
        workers.barrier()
    return config.out


class _Run:
    """The loop."""

    def __init__(
        self,
        config: PolicyTrainingConfig,
        reader: PolicyReader,
        policy: ChunkPolicy,
        optimizer: torch.optim.Optimizer,
        data: PolicyData,
        folder: RunFolder,
        workers: Workers,
        pool: ThreadPoolExecutor,
        on_progress: Callable[[PolicyMetrics], None],
    ) -> None:
        self._config = config
        self._reader = reader
        self._policy = policy
        self._optimizer = optimizer
        self._data = data
        self._folder = folder
        self._workers = workers
        self._pool = pool
        self._on_progress = on_progress
        self.first_scores: Mapping[str, Any] = {}
        """Held-out scores before the first step."""

    def train(self) -> tuple[RunState, PolicyScores]:
        """Train to the end of the budget; ``RunState.tokens`` counts compositions that were read."""
        config = self._config
        state = self._folder.restore(self._policy, self._optimizer)
        scores = None
        if state.step == 0:
            scores = self._measure()
            self._report(PolicyMetrics(0, 0.0, dev=scores))
        self._workers.barrier()  # the first worker writes what all read
        self.first_scores = next(record["dev"] for record in self._folder.records() if "dev" in record)
        fraction = self._fraction(state)
        while fraction < 1:
            started = time.perf_counter()
            rate = config.learning_rate * learning_rate_factor(state.step, fraction, config.warmup_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            stats: UpdateStats | None = None
            imitation: ImitationStats | None = None
            draws = 0
            if fraction < config.chosen_imitation and self._data.samples.has_questions:
                imitation = self._imitate(state.step)
            else:
                stats, draws = self._step(state.step)
            self._share_policy()
            seconds = state.seconds + self._shared(time.perf_counter() - started)
            state = RunState(state.step + 1, state.tokens + draws, seconds)
            fraction = self._fraction(state)
            scores = None
            if state.step % config.eval_steps == 0 or fraction >= 1:
                scores = self._measure()
            self._report(
                PolicyMetrics(
                    step=state.step,
                    fraction=min(1.0, fraction),
                    update=stats,
                    imitation=imitation,
                    learning_rate=rate,
                    draws=state.tokens,
                    seconds=state.seconds,
                    dev=scores,
                )
            )
            if state.step % config.checkpoint_steps == 0 or fraction >= 1:
                self._folder.save(self._policy, self._optimizer, state)
        return state, scores or self._measure()

    def _imitate(self, step: int) -> ImitationStats | None:
        """None where no answer of the drawn contexts stands in a passage."""
        reader = self._reader
        contexts = self._data.samples.questions(step, self._config.imitation_contexts)
        embedded = list(self._pool.map(lambda one: reader.compressor.embed(one.passages), contexts))
        prompts, targets = [], []
        for context, embeddings in zip(contexts, embedded, strict=True):
            for branch, ranks in zip(context.branches, context.ranks, strict=True):
                target = answer_target(context, branch, reader.compressor.chunk_tokens)
                if target is not None:
                    prompts.append(reader.see(context.passages, embeddings, branch.prompt, ranks))
                    targets.append(torch.from_numpy(target).to(self._workers.device))
        return imitate(self._policy, self._optimizer, prompts, targets) if prompts else None

    def _step(self, step: int) -> tuple[UpdateStats, int]:
        config = self._config
        contexts = self._data.samples.step(step, config.contexts)
        mine = range(self._workers.rank, len(contexts), self._workers.size)
        captured = dict(zip(mine, self._pool.map(lambda n: self._capture(contexts[n]), mine), strict=True))
        asked = [(number, place) for number, one in enumerate(contexts) for place in range(len(one.branches))]
        prompts = self._see(contexts, captured, asked)
        self._policy.train(False)
        # every worker draws for all contexts, so that all draw the same, and reads its own
        groups = draw_groups(self._policy, prompts, config.ppo, Random(f"{config.seed}/draws/{step}"))
        jobs = [
            (row, captured[n], contexts[n], place, group)
            for row, ((n, place), group) in enumerate(zip(asked, groups, strict=True))
            if n in captured
        ]
        losses = torch.zeros(len(groups), config.ppo.draws)
        for job, found in zip(jobs, self._pool.map(self._losses, jobs), strict=True):
            losses[job[0]] = found
        losses = self._workers.sum(losses).float()
        stats = update(self._policy, self._optimizer, groups, losses.to(self._workers.device), config.ppo)
        return stats, losses.numel()

    def _capture(self, context: PolicyContext) -> CapturedContext:
        return self._reader.capture(context.instruction, context.passages)

    def _see(
        self,
        contexts: Sequence[PolicyContext],
        captured: Mapping[int, CapturedContext],
        asked: Sequence[tuple[int, int]],
    ) -> list[PolicyInput]:
        """What the policy sees of each context and branch; chunk embeddings of what others read cost little."""
        reader = self._reader
        embeddings = [
            captured[number].embeddings if number in captured else reader.compressor.embed(one.passages)
            for number, one in enumerate(contexts)
        ]
        return [
            reader.see(
                contexts[n].passages, embeddings[n], contexts[n].branches[place].prompt, contexts[n].ranks[place]
            )
            for n, place in asked
        ]

    def _share_policy(self) -> None:
        """Every worker goes on with the first one's policy: what devices round differently does not add up."""
        if self._workers.size == 1:
            return
        with torch.no_grad():
            for parameter in self._policy.parameters():
                own = parameter if self._workers.rank == 0 else torch.zeros_like(parameter)
                parameter.copy_(self._workers.sum(own).to(parameter))

    def _shared(self, seconds: float) -> float:
        """The mean over the workers, so that all end at the same step."""
        return float(self._workers.sum(torch.tensor([seconds]))) / self._workers.size

    def _losses(self, job: tuple[int, CapturedContext, PolicyContext, int, Group]) -> Tensor:
        _, captured, context, place, group = job
        diverging = context.kind == "text" and self._config.text_reward == "divergence"
        measured = self._reader.divergences if diverging else self._reader.losses
        return measured(captured, context.branches[place], group.masks.cpu().numpy())

    def _measure(self) -> PolicyScores:
        self._policy.train(False)
        return measure_policy(self._policy, self._reader, self._data.probes, self._pool)

    def _report(self, metrics: PolicyMetrics) -> None:
        if self._workers.rank != 0:
            return
        with (self._folder.path / METRICS).open("a", encoding="utf-8") as log:
            log.write(json.dumps(metrics.to_dict()) + "\n")
        self._on_progress(metrics)

    def _fraction(self, state: RunState) -> float:
        if self._config.minutes is not None:
            return state.seconds / (60 * self._config.minutes)
        return state.step / (self._config.steps or 1)


def _pool(config: PolicyTrainingConfig, workers: Workers) -> ThreadPoolExecutor:
    """Threads with a core each; one on a GPU, and for one worker of several."""
    count = config.threads if workers.device.type == "cpu" and workers.size == 1 else 1
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def _start(policy: ChunkPolicy, path: Path) -> None:
    """Take the weights of the policy at ``path``. Raises SetupError where it is of another kind or size."""
    before = ChunkPolicy.load(path)
    if before.config != policy.config:
        raise SetupError(f"{path}: {before.config}, where {policy.config} is to be trained")
    policy.load_state_dict(before.state_dict())


def _write(bundle: Bundle, config: PolicyTrainingConfig, policy: ChunkPolicy, facts: Mapping[str, Any]) -> None:
    """``bundle`` with the policy beside those it has."""
    assert bundle.refrag is not None  # the reader was loaded from it
    kept = {
        name: PolicyPart(ChunkPolicy.load(bundle.path / record.file), record.facts, record.basis)
        for name, record in bundle.refrag.policies.items()
    }
    trained = PolicyPart(policy, facts, bundle.policy_basis)
    write_refrag(bundle, config.out, policies={**kept, config.policy_name: trained})
