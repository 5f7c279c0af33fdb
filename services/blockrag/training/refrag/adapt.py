"""``adapt_refrag``: one stage of learning to read compressed passages, or the rest of a run that was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from blockrag.errors import SetupError
from blockrag.modeling.bundle import file_sha256, load_bundle
from blockrag.modeling.model import load_stock_model
from blockrag.training.adaptation.run import RunFolder, RunState
from blockrag.training.adaptation.workers import OneWorker, Workers
from blockrag.training.allocator import keep_freed_memory
from blockrag.training.optimizer import learning_rate_factor
from blockrag.training.refrag.config import RefragConfig
from blockrag.training.refrag.metrics import MetricsWriter, RefragMetrics
from blockrag.training.refrag.opening import Start, load_reader, open_start
from blockrag.training.refrag.samples import RefragSample
from blockrag.training.refrag.scores import measure
from blockrag.training.refrag.stages import StageData, files_of, load_data, plan_stage
from blockrag.training.refrag.trainer import RefragTrainer
from blockrag.training.refrag.writing import write_stage

_SPEED_STEPS = 20

OnProgress = Callable[[RefragMetrics], None]


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
        return _Stage(config, start, load_data(config), workers, run, identity, on_progress).run()


def _fingerprint(bundle: Path | None) -> str | None:
    return None if bundle is None else load_bundle(bundle, verify_files=False).fingerprint


class _Stage:
    def __init__(
        self,
        config: RefragConfig,
        start: Start,
        data: StageData,
        workers: Workers,
        run: RunFolder,
        identity: dict[str, Any],
        on_progress: OnProgress | None,
    ) -> None:
        if workers.device.type == "cpu":
            keep_freed_memory()
        self._config = config
        self._start = start
        self._workers = workers
        self._run = run
        self._identity = identity
        self._on_progress = on_progress
        reader, tokenizer = load_reader(start, config)
        self._plan = plan_stage(config, start, data, tokenizer)
        self._trainer = RefragTrainer(reader, config, workers)
        self._log: MetricsWriter | None = None

    def run(self) -> Path:
        trainer = self._trainer
        state = self._run.restore(trainer.reader, trainer.optimizers)
        if self._workers.rank == 0:
            self._log = MetricsWriter(self._config.run_dir)
        try:
            if state.step == 0:
                self._report(RefragMetrics(step=0, fraction=0.0, dev=self._measure()))
            if self._fraction(state) < 1:
                state = self._train(state)
            return self._finish(state, self._averaged())
        finally:
            trainer.close()
            if self._log is not None:
                self._log.close()

    def _train(self, state: RunState) -> RunState:
        config = self._config
        speeds: list[tuple[int, float]] = []
        with ThreadPoolExecutor(1) as drawing:  # the tokenizers library computes without the interpreter's lock
            fraction = self._fraction(state)
            ahead = drawing.submit(self._draw, state)
            while True:
                samples = ahead.result()
                started = time.perf_counter()
                factor = learning_rate_factor(state.step, fraction, config.warmup_steps)
                ahead = drawing.submit(self._draw, replace(state, step=state.step + 1))
                result = self._trainer.step(samples, factor)
                took = self._shared(time.perf_counter() - started)
                state = replace(
                    state, step=state.step + 1, tokens=state.tokens + result.tokens, seconds=state.seconds + took
                )
                fraction = self._fraction(state)
                done = fraction >= 1
                speeds = [*speeds, (result.tokens, took)][-_SPEED_STEPS:]
                self._report(
                    RefragMetrics(
                        step=state.step,
                        fraction=min(1.0, fraction),
                        losses=result.losses,
                        gradient_norm=result.gradient_norm,
                        learning_rate=config.learning_rate * factor,
                        tokens=state.tokens,
                        seconds=state.seconds,
                        tokens_per_second=sum(tokens for tokens, _ in speeds) / sum(took for _, took in speeds),
                        eta_seconds=self._left(state, sum(took for _, took in speeds) / len(speeds)),
                        dev=self._measure() if done or state.step % config.eval_steps == 0 else {},
                    )
                )
                # after the report: what a checkpoint holds is in the metrics, and what came later is cut from them
                if done or state.step % config.checkpoint_steps == 0:
                    self._run.save(self._trainer.reader, self._trainer.optimizers, state)
                if done:
                    ahead.cancel()
                    return state

    def _draw(self, state: RunState) -> list[RefragSample]:
        """Samples of the step that ``state`` is before; of its time, where the budget is time, about."""
        return self._plan.maker.step(state.step, min(1.0, self._fraction(state)), self._config.tokens_per_step)

    def _fraction(self, state: RunState) -> float:
        if self._config.minutes is not None:
            return state.seconds / (60 * self._config.minutes)
        return state.step / (self._config.steps or 1)

    def _left(self, state: RunState, seconds: float) -> float:
        if self._config.minutes is not None:
            return max(0.0, 60 * self._config.minutes - state.seconds)
        return ((self._config.steps or 0) - state.step) * seconds

    def _shared(self, seconds: float) -> float:
        """The mean over the workers, so that all end at the same step."""
        return float(self._workers.sum(torch.tensor([seconds]))) / self._workers.size

    def _measure(self) -> dict[str, dict[str, float]]:
        return measure(self._plan.probes, self._trainer.score) if self._config.dev_samples else {}

    def _report(self, metrics: RefragMetrics) -> None:
        if self._log is not None:
            self._log.write(metrics)
            if self._on_progress is not None:
                self._on_progress(metrics)

    def _averaged(self) -> dict[str, Any]:
        """Average the decoder, where that was asked for: with what, and the scores after it."""
        config = self._config
        if config.average_with is None:
            return {}
        bundle = load_bundle(config.average_with, verify_files=False)
        self._trainer.average(dict(load_stock_model(bundle).named_parameters()), config.learnt_share)
        return {"average_with": bundle.fingerprint, "averaged": self._measure()}

    def _finish(self, state: RunState, averaged: dict[str, Any]) -> Path:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self._trainer.reader, options=options)
        if self._workers.rank == 0:
            measured = [record for record in self._run.records() if "dev" in record]
            config = self._config
            facts = {
                **self._identity["recipe"],
                "base": self._identity["base"],
                # what readers are trained on comes with files that say what must not be trained on
                "data": sorted({path.name for path in files_of(config) if path.parent.name != "dev"}),
                "steps_done": state.step,
                "tokens": state.tokens,
                "seconds": round(state.seconds),
                "workers": self._workers.size,
                "before": measured[0]["dev"] if measured else {},
                "after": measured[-1]["dev"] if measured else {},
                **averaged,
            }
            write_stage(weights, self._start, config, facts)
            self._run.drop_checkpoints()
        self._workers.barrier()
        return self._config.out
