"""PEAR as one procedure: detect under both masks, choose heads, learn their coefficients, fold, score again.

The coefficients of chosen heads are learned with everything else frozen: cross-entropy on the second copy, from its
second token on: nothing before its first token says that a copy follows, and under the block mask that place belongs to
a passage. (The published code counts it too; its loss there is that of a random token, whatever τ is.) Adam, a linear
decay to 0 after two steps of warm-up as in the published code.

Source: PEAR (arXiv 2409.19745), §3.2.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockrag.errors import InvalidRequestError
from blockrag.modeling.files import replace_file
from blockrag.modeling.pear import AttentionHeads, attention_heads, fold
from blockrag.modeling.pear_record import MASKS, HeadCoefficient, Mask, PearRecord, ProxyScore
from blockrag.training.loop import Schedule, StepResult, train
from blockrag.training.pear.detection import Detection, detect, rank_correlation
from blockrag.training.pear.passes import ProxyTask, check_length, forward, prefill
from blockrag.training.pear.pear_config import CONDITIONS, LEAST_HEADS, PUBLISHED_SHARE, LearningConfig, PearConfig
from blockrag.training.run import OnProgress, RunFolder, Scores, StepMetrics
from blockrag.training.workers import Workers

_WARMUP = 2
_KEPT = 25
"""Steps between two checkpoints."""
_SEEDS = 1_000_003
"""Between the seeds of two steps, so that runs with other seeds draw anew."""


def learn(
    model: PreTrainedModel,
    chosen: Sequence[tuple[int, int]],
    task: ProxyTask,
    candidates: Tensor,
    config: LearningConfig,
    seed: int,
    run: RunFolder | None = None,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """τ of each ``chosen`` (layer, head), in their order. The weights are frozen, and as they were, afterwards.

    With ``run``, which must be opened, it goes on from what was learned there. Raises InvalidRequestError for too few
    candidates or prompts longer than the model's positions.
    """
    check_length(model, task.length)
    model.requires_grad_(False)
    learner = _Learner(model, _Coefficients(len(chosen), model.device), task, candidates, config, seed)
    schedule = Schedule(config.steps, config.learning_rate, _WARMUP, checkpoint_steps=_KEPT, decay="linear")
    workers = Workers(model.device)
    with scaled(attention_heads(model), chosen, learner.model.tau), tempfile.TemporaryDirectory() as none:
        train(learner, schedule, run or RunFolder(Path(none), workers), workers, on_progress)
    return [float(value) for value in learner.model.tau.detach().cpu()]


class _Coefficients(nn.Module):
    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.ones(count, device=device))


@dataclass
class _Learner:
    """What ``train`` trains."""

    reader: PreTrainedModel
    model: _Coefficients
    task: ProxyTask
    candidates: Tensor
    config: LearningConfig
    seed: int

    def __post_init__(self) -> None:
        self.optimizers = [torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate)]

    def draw(self, step: int, fraction: float) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + _SEEDS * step)
        return self.task.draw(self.config.batch, self.candidates, generator)

    def step(self, samples: Tensor, factor: float) -> StepResult:
        (optimizer,) = self.optimizers
        optimizer.param_groups[0]["lr"] = self.config.learning_rate * factor
        logits, targets = _second_copy(self.reader, self.task, samples.to(self.reader.device))
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert self.model.tau.grad is not None
        return StepResult({"copy": float(loss.detach())}, float(self.model.tau.grad.norm()), len(targets))

    def measure(self) -> Scores:
        return {}


@torch.inference_mode()
def proxy_score(
    model: PreTrainedModel, task: ProxyTask, candidates: Tensor, seed: int, samples: int = 200, batch: int = 20
) -> ProxyScore:
    """Loss and accuracy of the second copy on prompts drawn with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    loss = hits = 0.0
    for start in range(0, samples, batch):
        tokens = task.draw(min(batch, samples - start), candidates, generator).to(model.device)
        logits, targets = _second_copy(model, task, tokens)
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        hits += float((logits.argmax(-1) == targets).sum())
    count = samples * (task.n - 1)
    return ProxyScore(loss=loss / count, accuracy=hits / count)


@contextmanager
def scaled(heads: AttentionHeads, chosen: Sequence[tuple[int, int]], tau: Tensor) -> Iterator[None]:
    """Within it the output of each chosen (layer, head) is multiplied by its element of ``tau``, differentiably."""

    def scale(places: list[int], _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        own = torch.tensor([chosen[place][1] for place in places], device=tau.device)
        factors = torch.ones(heads.num_heads, device=tau.device, dtype=tau.dtype)
        factors = factors.index_put((own,), tau[places])
        return (args[0] * factors.repeat_interleave(heads.head_dim).to(args[0].dtype),)

    by_layer: dict[int, list[int]] = {}
    for place, (layer, _) in enumerate(chosen):
        by_layer.setdefault(layer, []).append(place)
    with ExitStack() as hooks:
        for layer, places in by_layer.items():
            hooks.enter_context(heads.outputs[layer].register_forward_pre_hook(partial(scale, places)))
        yield


def _second_copy(model: PreTrainedModel, task: ProxyTask, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that predict the second copy's tokens after its first, float32 [samples * (n - 1), vocab]; the tokens."""
    *passages, copy = task.blocks(tokens)
    logits = forward(model, copy[:, :-1], prefill(model, passages), task.length - task.n).logits
    return logits.float().flatten(0, 1), copy[:, 1:].flatten()


def task_of(config: PearConfig, mask: Mask) -> ProxyTask:
    """What is learned and scored under a mask."""
    return ProxyTask(config.learning.n, mask, config.distractors if mask == "block" else 0)


LEAST_CHANGE = 1e-5
"""Δπ below it is rounding: a head that does nothing is not one that suppresses."""

_DETECTIONS = "detections.json"


@dataclass(frozen=True)
class PearReport:
    """What was found."""

    detections: Mapping[str, Detection]
    """One of each of ``CONDITIONS``."""
    correlations: Mapping[str, float]
    """Spearman's ρ of Δπ over all heads between two conditions."""
    before: Mapping[str, ProxyScore]
    """Held-out proxy score under each mask."""
    record: PearRecord | None
    """For the manifest; None when no head has a positive Δπ, or nothing was to be learned."""
    seconds: Mapping[str, float]
    """Wall time of each stage."""


def adapt(
    model: PreTrainedModel,
    candidates: Tensor,
    config: PearConfig,
    run: RunFolder | None = None,
    *,
    learning: bool = True,
    on_progress: OnProgress = lambda _: None,
) -> PearReport:
    """Detect, and unless ``learning`` is off learn and fold: afterwards ``model`` has the folded weights.

    ``candidates``, int64 [any], are the tokens that prompts are drawn from. With ``run``, which must be opened, it
    goes on from what was detected and learned there. Raises InvalidRequestError for settings that do not fit the
    model, UnsupportedModelError for a model without heads to be found.
    """
    heads = attention_heads(model)
    wanted = config.heads if config.heads is not None else max(LEAST_HEADS, round(PUBLISHED_SHARE * heads.count))
    if config.heads is not None and not 0 < config.heads <= heads.count:
        raise InvalidRequestError("heads", f"{config.heads}, where the model has {heads.count}")
    watch = _Watch()
    detections = _read_detections(run)
    for condition in CONDITIONS:
        stage = f"detect, {condition}"
        if condition not in detections:
            detections[condition] = detect(
                model,
                candidates,
                config.under(condition),
                lambda share, stage=stage: on_progress(StepMetrics(step=0, fraction=share, stage=stage)),  # type: ignore[misc]
            )
            _keep_detections(run, detections)
        watch.stop(stage)
    pairs = (("full", "block"), ("full", "full, same prompts"), ("full, same prompts", "block"))
    correlations = {
        f"{one} / {other}": rank_correlation(detections[one].delta_pi, detections[other].delta_pi)
        for one, other in pairs
    }

    def scores() -> dict[str, ProxyScore]:
        return {mask: proxy_score(model, task_of(config, mask), candidates, config.seed + 2) for mask in MASKS}

    before = scores()
    watch.stop("score before")
    chosen = suppressing(detections[config.mask])[:wanted]
    record = None
    if chosen and learning:
        taus = learn(
            model,
            [(layer, head) for layer, head, _ in chosen],
            task_of(config, config.mask),
            candidates,
            config.learning,
            config.seed + 1,
            run,
            lambda metrics: on_progress(replace(metrics, stage="learn")),
        )
        watch.stop("learn")
        coefficients = tuple(
            HeadCoefficient(layer, head, tau, change) for (layer, head, change), tau in zip(chosen, taus, strict=True)
        )
        fold(model, coefficients)
        after = scores()
        watch.stop("score after")
        used = ("mask", "mean", "later_heads", "sizes", "distractors", "seed")
        record = PearRecord(
            heads=coefficients,
            before=before,
            after=after,
            **{name: getattr(config, name) for name in used},
            **asdict(config.learning),
        )
    return PearReport(detections, correlations, before, record, watch.seconds)


def suppressing(detection: Detection) -> list[tuple[int, int, float]]:
    """(layer, head, Δπ) of the heads whose replacement raises π, strongest first."""
    return [item for item in detection.ranked() if item[2] > LEAST_CHANGE]


def _read_detections(run: RunFolder | None) -> dict[str, Detection]:
    path = run.path / _DETECTIONS if run is not None else None
    if path is None or not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {condition: Detection.from_dict(found) for condition, found in stored.items()}


def _keep_detections(run: RunFolder | None, detections: Mapping[str, Detection]) -> None:
    if run is not None:
        values = {condition: found.to_dict() for condition, found in detections.items()}
        replace_file(run.path / _DETECTIONS, json.dumps(values) + "\n")


class _Watch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._since
        self._since = now
