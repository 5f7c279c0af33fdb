"""PEAR as one procedure: detect under both masks, choose heads, learn their coefficients, fold, score again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.errors import InvalidRequestError
from blockrag.modeling.files import replace_file
from blockrag.modeling.pear import attention_heads, fold
from blockrag.modeling.pear_record import MASKS, HeadCoefficient, PearRecord, ProxyScore
from blockrag.training.adaptation.metrics import OnProgress, StepMetrics
from blockrag.training.adaptation.run import RunFolder
from blockrag.training.pear.config import CONDITIONS, LEAST_HEADS, PUBLISHED_SHARE, PearConfig
from blockrag.training.pear.detection import Detection, detect, rank_correlation
from blockrag.training.pear.learning import learn, proxy_score

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
            with_progress = _share_of(on_progress, stage)
            detections[condition] = detect(model, candidates, config.detection(condition), with_progress)
            _keep_detections(run, detections)
        watch.stop(stage)
    correlations = {
        f"full / {other}": rank_correlation(detections["full"].delta_pi, detections[other].delta_pi)
        for other in ("block", "full, same prompts")
    }
    correlations["full, same prompts / block"] = rank_correlation(
        detections["full, same prompts"].delta_pi, detections["block"].delta_pi
    )
    before: dict[str, ProxyScore] = {
        mask: proxy_score(model, config.task(mask), candidates, config.seed + 2) for mask in MASKS
    }
    watch.stop("score before")
    chosen = suppressing(detections[config.mask])[:wanted]
    record = None
    if chosen and learning:
        record = _learn_and_fold(model, chosen, candidates, config, before, watch, run, on_progress)
    return PearReport(detections, correlations, before, record, watch.seconds)


def suppressing(detection: Detection) -> list[tuple[int, int, float]]:
    """(layer, head, Δπ) of the heads whose replacement raises π, strongest first."""
    return [item for item in detection.ranked() if item[2] > LEAST_CHANGE]


def _learn_and_fold(
    model: PreTrainedModel,
    chosen: list[tuple[int, int, float]],
    candidates: Tensor,
    config: PearConfig,
    before: Mapping[str, ProxyScore],
    watch: _Watch,
    run: RunFolder | None,
    on_progress: OnProgress,
) -> PearRecord:
    taus = learn(
        model,
        [(layer, head) for layer, head, _ in chosen],
        config.task(config.mask),
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
    after: dict[str, ProxyScore] = {
        mask: proxy_score(model, config.task(mask), candidates, config.seed + 2) for mask in MASKS
    }
    watch.stop("score after")
    return PearRecord(
        heads=coefficients,
        mask=config.mask,
        mean=config.mean,
        later_heads=config.later_heads,
        sizes=config.sizes,
        distractors=config.distractors,
        n=config.learning.n,
        steps=config.learning.steps,
        batch=config.learning.batch,
        learning_rate=config.learning.learning_rate,
        seed=config.seed,
        before=before,
        after=after,
    )


def _share_of(on_progress: OnProgress, stage: str) -> Callable[[float], None]:
    return lambda share: on_progress(StepMetrics(step=0, fraction=share, stage=stage))


def _read_detections(run: RunFolder | None) -> dict[str, Detection]:
    path = run.path / _DETECTIONS if run is not None else None
    if path is None or not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {
        condition: Detection(
            torch.tensor(found["delta_pi"], dtype=torch.float64), tuple(found["pi"]), found["accuracy"]
        )
        for condition, found in stored.items()
    }


def _keep_detections(run: RunFolder | None, detections: Mapping[str, Detection]) -> None:
    if run is not None:
        values = {
            condition: {"delta_pi": found.delta_pi.tolist(), "pi": found.pi, "accuracy": found.accuracy}
            for condition, found in detections.items()
        }
        replace_file(run.path / _DETECTIONS, json.dumps(values) + "\n")


class _Watch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._since
        self._since = now
