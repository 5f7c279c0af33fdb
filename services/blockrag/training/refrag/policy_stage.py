"""Training a chunk policy with a frozen reader: ``train_policy``.

Behind ``blockrag adapt refrag --stage policy``. Decoder, chunk encoder and projector do not change; the bundle gets a
policy beside them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from blockrag.errors import SetupError
from blockrag.modeling.bundle import Bundle, file_sha256, load_bundle
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyConfig
from blockrag.modeling.refrag.writing import PolicyPart, write_refrag
from blockrag.training.adaptation.run import METRICS, RunFolder, RunState
from blockrag.training.adaptation.workers import OneWorker
from blockrag.training.optimizer import learning_rate_factor
from blockrag.training.refrag.policy import (
    Group,
    ImitationStats,
    PpoSettings,
    UpdateStats,
    draw_groups,
    imitate,
    update,
)
from blockrag.training.refrag.policy_contexts import CapturedContext, PolicyReader
from blockrag.training.refrag.policy_data import PolicyData, load_policy_data
from blockrag.training.refrag.policy_probes import PolicyScores, measure_policy
from blockrag.training.refrag.policy_samples import PolicyContext, answer_target

_HEAD = 32
"""Width of a policy's head."""


@dataclass(frozen=True)
class PolicyTrainingConfig:
    """A policy's training."""

    bundle: Path
    """A bundle with chunk compression; it is not changed."""
    out: Path
    """The bundle to make. The run itself lives beside it, in ``run_dir``."""
    query: bool = True
    """Whether the policy sees the question; else it is the paper's."""
    name: str = ""
    """Name of the policy in the bundle; empty: ``query`` or ``blind``. One of the same name is replaced."""
    text: tuple[Path, ...] = ()
    """JSONL(.gz) files of long texts, or directories of such."""
    data: tuple[Path, ...] = ()
    """JSONL(.gz) files of question rows, as ``adapt block`` reads them."""
    reader_data: Path | None = None
    """A directory that readers are trained from scratch on: its texts and questions stand beside or instead."""
    minutes: float | None = None
    """Time budget of the steps. Pauses and measurements do not count."""
    steps: int | None = None
    """Budget in steps, for runs that must be reproducible. Exactly one of ``minutes`` and ``steps`` is given."""
    text_share: float | None = None
    """Share of contexts whose target is the next paragraph; None: 0.6, with the question in sight 0.2."""
    text_reward: Literal["label", "divergence"] = "label"
    """What a text's choice is rewarded by: the target's own likelihood, as published, or how little the predictions
    diverge from those after the uncompressed passages, which says the same with less noise."""
    width: int = 64
    """Of the policy; it has a head per 32 and twice as many units inside its feed-forward layers. 64 rates 320 chunks
    in 1.2 ms on one core, 96 in 1.6."""
    start_from: Path | None = None
    """A policy's file to start from, after the parts it was trained with were tuned further; None: random weights."""
    contexts: int = 4
    """Contexts of a step: reading their blocks is what a step costs most, next to the draws."""
    questions: int = 4
    """Most questions of a context, each with draws of its own."""
    max_passages: int = 10
    ppo: PpoSettings = field(default_factory=PpoSettings)
    imitation: float | None = None
    """Share of the budget in which the policy first learns to draw the chunks that hold the answers, without reading
    anything; None: 0.25 for one that sees the question, else 0, as published."""
    imitation_contexts: int = 4
    """Contexts of such a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate, after a warm-up; it falls with a cosine."""
    warmup_steps: int = 10
    dev_contexts: int = 48
    """Held-out questions, and as many texts, to measure on."""
    eval_steps: int = 100
    """Steps between two measurements; start and end are always measured."""
    checkpoint_steps: int = 25
    """Steps between two checkpoints: what a kill costs at most."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the frozen reader; the policy is in float32."""
    threads: int = 2
    """On a CPU: threads, each reading contexts of its own with one core."""
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise SetupError("give exactly one of minutes and steps")
        counts = ("contexts", "questions", "max_passages", "eval_steps", "checkpoint_steps", "threads")
        for name in counts:
            if getattr(self, name) < 1:
                raise SetupError(f"{name} {getattr(self, name)!r}: must be at least 1")
        if self.width < _HEAD or self.width % _HEAD:
            raise SetupError(f"width {self.width!r}: must be a multiple of {_HEAD}")
        if self.text_reward not in ("label", "divergence"):
            raise SetupError(f"text_reward {self.text_reward!r}: must be label or divergence")
        for name in ("minutes", "steps", "learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SetupError(f"{name} {value!r}: must be positive")
        if not 0 <= self.chosen_imitation < 1 or self.imitation_contexts < 1:
            raise SetupError(f"imitation {self.imitation!r}: must be from 0 to below 1, with at least one context")
        if self.text_share is not None and not 0 <= self.text_share <= 1:
            raise SetupError(f"text_share {self.text_share!r}: must be from 0 to 1")
        if not (self.text or self.data or self.reader_data):
            raise SetupError("a policy needs questions (--data), texts (--text) or both (--reader-data)")

    @property
    def policy_name(self) -> str:
        return self.name or ("query" if self.query else "blind")

    @property
    def chosen_text_share(self) -> float:
        if self.text_share is not None:
            return self.text_share
        return 0.2 if self.query else 0.6

    @property
    def chosen_imitation(self) -> float:
        if self.imitation is not None:
            return self.imitation
        return 0.25 if self.query else 0.0

    def sizes(self, encoder_width: int) -> PolicyConfig:
        """Of the policy to train."""
        return PolicyConfig(
            encoder_width, self.query, width=self.width, heads=self.width // _HEAD, hidden=2 * self.width
        )

    @property
    def run_dir(self) -> Path:
        """Checkpoint, metrics.jsonl and run.json."""
        return self.out.parent / f"{self.out.name}.run"

    def recipe(self) -> dict[str, Any]:
        """The values that decide the result, beside bundle and data."""
        names = (
            *("query", "minutes", "steps", "contexts", "questions", "max_passages", "learning_rate", "warmup_steps"),
            *("dev_contexts", "precision", "seed", "text_reward", "width"),
        )
        chosen = {name: getattr(self, name) for name in names}
        start = file_sha256(self.start_from) if self.start_from is not None else ""
        imitation = {"start": start, "imitation": self.chosen_imitation, "imitation_contexts": self.imitation_contexts}
        return {**chosen, **imitation, "text_share": self.chosen_text_share, "ppo": asdict(self.ppo)}


@dataclass(frozen=True)
class PolicyMetrics:
    """State of a run after a step; step 0 is before the first."""

    step: int
    fraction: float
    """Part of the budget that is used up, 0 to 1."""
    update: UpdateStats | None = None
    imitation: ImitationStats | None = None
    """One of the two; None at step 0."""
    learning_rate: float = 0.0
    draws: int = 0
    """Compositions read since the start."""
    seconds: float = 0.0
    """Time spent in steps since the start."""
    dev: PolicyScores | None = None
    """Held-out scores, where they were measured."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def train_policy(
    config: PolicyTrainingConfig, on_progress: Callable[[PolicyMetrics], None] = lambda _metrics: None
) -> Path:
    """Train until the budget is used up, or continue a run that was stopped; returns the bundle with the policy.

    Raises SetupError for data that is missing, a run of another recipe in ``run_dir`` or an ``out`` that exists,
    BundleError for a bundle without chunk compression.
    """
    if config.out.exists():
        raise SetupError(f"{config.out}: exists already")
    bundle = load_bundle(config.bundle, verify_files=False)
    reader = PolicyReader.load(bundle, config.device, bf16=config.precision == "bf16")
    data = load_policy_data(config, bundle)
    torch.manual_seed(config.seed)
    policy = ChunkPolicy(config.sizes(reader.compressor.encoder_width)).to(config.device)
    if config.start_from is not None:
        _start(policy, config.start_from)
    # no weight decay: the few steps do not overfit draws that are made anew each time
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    folder = RunFolder(config.run_dir, OneWorker(config.device))
    identity = {**config.recipe(), "bundle": bundle.policy_basis, "data": data.digests}
    with folder.opened(identity), _pool(config) as pool:
        run = _Run(config, reader, policy, optimizer, data, folder, pool, on_progress)
        state, scores = run.train()
        facts = {
            "recipe": config.recipe(),
            "steps": state.step,
            "seconds": round(state.seconds),
            "draws": state.tokens,
            "data": data.digests,
            "held_out": {"before": run.first_scores, "after": scores.to_dict()},
        }
        made = _write(bundle, config, policy, facts)
        folder.drop_checkpoints()
    return made


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
        pool: ThreadPoolExecutor,
        on_progress: Callable[[PolicyMetrics], None],
    ) -> None:
        self._config = config
        self._reader = reader
        self._policy = policy
        self._optimizer = optimizer
        self._data = data
        self._folder = folder
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
            seconds = state.seconds + time.perf_counter() - started
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
                    targets.append(torch.from_numpy(target).to(self._config.device))
        return imitate(self._policy, self._optimizer, prompts, targets) if prompts else None

    def _step(self, step: int) -> tuple[UpdateStats, int]:
        config, reader = self._config, self._reader
        contexts = self._data.samples.step(step, config.contexts)
        captured = list(self._pool.map(lambda one: reader.capture(one.instruction, one.passages), contexts))
        asked = [(number, place) for number, one in enumerate(contexts) for place in range(len(one.branches))]
        prompts = []
        for number, place in asked:
            one, context = captured[number], contexts[number]
            question, ranks = context.branches[place].prompt, context.ranks[place]
            prompts.append(reader.see(one.passages, one.embeddings, question, ranks))
        self._policy.train(False)
        random = Random(f"{config.seed}/draws/{step}")
        groups = draw_groups(self._policy, prompts, config.ppo, random)
        jobs = [(captured[n], contexts[n], place, group) for (n, place), group in zip(asked, groups, strict=True)]
        losses = torch.stack(list(self._pool.map(self._losses, jobs)))
        stats = update(self._policy, self._optimizer, groups, losses.to(config.device), config.ppo)
        return stats, losses.numel()

    def _losses(self, job: tuple[CapturedContext, PolicyContext, int, Group]) -> Tensor:
        captured, context, place, group = job
        diverging = context.kind == "text" and self._config.text_reward == "divergence"
        measured = self._reader.divergences if diverging else self._reader.losses
        return measured(captured, context.branches[place], group.masks.cpu().numpy())

    def _measure(self) -> PolicyScores:
        self._policy.train(False)
        return measure_policy(self._policy, self._reader, self._data.probes, self._pool)

    def _report(self, metrics: PolicyMetrics) -> None:
        with (self._folder.path / METRICS).open("a", encoding="utf-8") as log:
            log.write(json.dumps(metrics.to_dict()) + "\n")
        self._on_progress(metrics)

    def _fraction(self, state: RunState) -> float:
        if self._config.minutes is not None:
            return state.seconds / (60 * self._config.minutes)
        return state.step / (self._config.steps or 1)


def _pool(config: PolicyTrainingConfig) -> ThreadPoolExecutor:
    """Threads with a core each; one on a GPU."""
    count = config.threads if config.device == "cpu" else 1
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def _start(policy: ChunkPolicy, path: Path) -> None:
    """Take the weights of the policy at ``path``. Raises SetupError where it is of another kind or size."""
    before = ChunkPolicy.load(path)
    if before.config != policy.config:
        raise SetupError(f"{path}: {before.config}, where {policy.config} is to be trained")
    policy.load_state_dict(before.state_dict())


def _write(bundle: Bundle, config: PolicyTrainingConfig, policy: ChunkPolicy, facts: Mapping[str, Any]) -> Path:
    """``bundle`` with the policy beside those it has."""
    assert bundle.refrag is not None  # the reader was loaded from it
    kept = {
        name: PolicyPart(ChunkPolicy.load(bundle.path / record.file), record.facts, record.basis)
        for name, record in bundle.refrag.policies.items()
    }
    trained = PolicyPart(policy, facts, bundle.policy_basis)
    write_refrag(bundle, config.out, policies={**kept, config.policy_name: trained})
    return config.out
