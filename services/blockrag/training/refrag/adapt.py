"""``adapt_refrag``: one stage of learning to read compressed passages, or the rest of a run that was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from blockrag.errors import SetupError
from blockrag.modeling.bundle import file_sha256, load_bundle
from blockrag.modeling.model import load_stock_model
from blockrag.training.adaptation.metrics import OnProgress, Scores
from blockrag.training.adaptation.run import RunFolder, RunState
from blockrag.training.adaptation.workers import OneWorker, Workers
from blockrag.training.loop import Schedule, train
from blockrag.training.refrag.config import RefragConfig
from blockrag.training.refrag.opening import Start, load_reader, open_start
from blockrag.training.refrag.samples import RefragSample
from blockrag.training.refrag.scores import measure
from blockrag.training.refrag.stages import StageData, files_of, load_data, plan_stage
from blockrag.training.refrag.trainer import RefragTrainer
from blockrag.training.refrag.writing import write_stage


def prepare(config: RefragConfig, workers: int = 1) -> Start:
    """Check bundle and sizes before anything heavy is loaded. Raises SetupError or BundleError."""
    if config.parts % workers:
        raise SetupError(f"parts {config.parts}: no multiple of {workers} workers")
    if config.optimizer == "muon" and workers > 1:
        raise SetupError("optimizer 'muon': several workers share every matrix out; choose adamw")
    files_of(config)
    return open_start(config)


def adapt_refrag(config: RefragConfig, workers: Workers | None = None, on_progress: OnProgress | None = None) -> Path:
    """Run the stage and write the bundle ``config.out``; returns it.

    Every worker calls it. A run that was stopped goes on from its last checkpoint and, with a budget in steps, ends as
    it would have without the stop. Raises SetupError for what a caller must change.
    """
    workers = workers or OneWorker(config.device)
    start = prepare(config, workers.size)
    run = RunFolder(config.run_dir, workers)
    identity = {
        "kind": "refrag",
        "base": start.bundle.fingerprint,
        "compression": None if start.fresh else start.bundle.compression_fingerprint,
        "data": [{"file": path.name, "sha256": file_sha256(path)} for path in files_of(config)],
        "recipe": {**config.recipe(), "chunk_tokens": start.chunk_tokens},
        "average_with": _fingerprint(config.average_with),
    }
    with run.opened(identity):
        learner = _Learner(config, start, load_data(config), workers)
        try:
            state = train(learner, Schedule.of(config), run, workers, on_progress)
            averaged = learner.average(config.average_with)
            _finish(config, start, learner, state, run, identity, averaged, workers)
        finally:
            learner.trainer.close()
    return config.out


def _fingerprint(bundle: Path | None) -> str | None:
    return None if bundle is None else load_bundle(bundle, verify_files=False).fingerprint


class _Learner:
    """What ``train`` trains: a reader of compositions, on a stage's samples."""

    def __init__(self, config: RefragConfig, start: Start, data: StageData, workers: Workers) -> None:
        self._config = config
        reader, tokenizer = load_reader(start, config)
        self._plan = plan_stage(config, start, data, tokenizer)
        self.trainer = RefragTrainer(reader, config, workers)
        self.model = self.trainer.reader
        self.optimizers = self.trainer.optimizers
        self.step = self.trainer.step

    def draw(self, step: int, fraction: float) -> list[RefragSample]:
        return self._plan.maker.step(step, min(1.0, fraction), self._config.tokens_per_step)

    def measure(self) -> Scores:
        return measure(self._plan.probes, self.trainer.score) if self._config.dev_samples else {}

    def average(self, other: Path | None) -> dict[str, Any]:
        """Average the decoder, where that was asked for: with what, and the scores after it."""
        if other is None:
            return {}
        bundle = load_bundle(other, verify_files=False)
        self.trainer.average(dict(load_stock_model(bundle).named_parameters()), self._config.learnt_share)
        return {"average_with": bundle.fingerprint, "averaged": self.measure()}


def _finish(
    config: RefragConfig,
    start: Start,
    learner: _Learner,
    state: RunState,
    run: RunFolder,
    identity: Mapping[str, Any],
    averaged: Mapping[str, Any],
    workers: Workers,
) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(learner.model, options=options)
    if workers.rank == 0:
        before, after = run.scores()
        facts = {
            **identity["recipe"],
            "base": identity["base"],
            # what readers are trained on comes with files that say what must not be trained on
            "data": sorted({path.name for path in files_of(config) if path.parent.name != "dev"}),
            "steps_done": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds),
            "workers": workers.size,
            "before": before,
            "after": after,
            **averaged,
        }
        write_stage(weights, start, config, facts)
        run.drop_checkpoints()
    workers.barrier()
