"""``adapt_block``: adapt a checkpoint to block attention, or go on with a run that was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from blockrag.errors import SetupError
from blockrag.evaluation.pieces import PieceMaker
from blockrag.modeling.bundle import file_sha256
from blockrag.training.adaptation.batch import Prompts
from blockrag.training.adaptation.config import BlockAdaptConfig
from blockrag.training.adaptation.contexts import ContextSource
from blockrag.training.adaptation.metrics import DevScores, MetricsLog, StepMetrics
from blockrag.training.adaptation.pools import load_pools
from blockrag.training.adaptation.rows import Row, data_files, read_rows
from blockrag.training.adaptation.run import RunFolder, RunState
from blockrag.training.adaptation.samples import SampleLimits, SampleSource
from blockrag.training.adaptation.source import Source, load_for_training, open_source
from blockrag.training.adaptation.trainer import BlockTrainer
from blockrag.training.adaptation.workers import OneWorker, Workers
from blockrag.training.adaptation.writing import write_bundle
from blockrag.training.allocator import keep_freed_memory
from blockrag.training.lora import trained_adapter
from blockrag.training.optimizer import learning_rate_factor

_SPEED_STEPS = 20
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Preparation:
    """What was checked before anything heavy is loaded."""

    source: Source
    train: Sequence[Row]
    """Empty where contexts of many questions are drawn."""
    dev: Sequence[Row]
    """Empty where nothing is measured."""


def prepare(config: BlockAdaptConfig, workers: int = 1) -> Preparation:
    """Check model, data and sizes. Raises SetupError, BundleError or UnsupportedModelError naming the problem."""
    if config.out.exists():
        raise SetupError(f"{config.out}: exists already")
    if config.batch_size % workers:
        raise SetupError(f"batch_size {config.batch_size} is no multiple of {workers} workers")
    if workers > 1 and config.masks == "mixed" and config.micro_batch > 1:
        # workers must make as many passes, since each gathers the others' parameters
        raise SetupError(f"micro_batch {config.micro_batch}: masks 'mixed' on several workers take 1")
    source = open_source(config)
    if config.questions > 1:
        data_files([*config.data, *config.exclude])  # named before the model is loaded
        return Preparation(source, [], read_rows([config.dev]) if config.dev and config.dev_rows else [])
    rows = read_rows(config.data)
    if config.dev is not None:
        return Preparation(source, rows, read_rows([config.dev]) if config.dev_rows else [])
    held_out = min(config.dev_rows, int(_HELD_OUT_SHARE * len(rows)))
    chosen = set(Random(f"{config.seed}/held out").sample(range(len(rows)), held_out))
    return Preparation(
        source,
        [row for number, row in enumerate(rows) if number not in chosen],
        [rows[number] for number in sorted(chosen)],
    )


def adapt_block(
    config: BlockAdaptConfig,
    workers: Workers | None = None,
    on_progress: Callable[[StepMetrics], None] | None = None,
) -> Path:
    """Adapt ``config.model`` and write the bundle ``config.out``; returns it.

    Every worker calls it. A run that was stopped goes on from its last checkpoint and ends as it would have without
    the stop. Raises SetupError for what a caller must change; see ``prepare`` and ``RunFolder``.
    """
    workers = workers or OneWorker(config.device)
    prepared = prepare(config, workers.size)
    run = RunFolder(config.run_dir, workers)
    identity = {
        "kind": "block",
        "base": prepared.source.fingerprint(),
        "template": prepared.source.template.to_dict(),
        "data": [{"file": path.name, "sha256": file_sha256(path)} for path in data_files(config.data)],
        "dev": config.dev.name if config.dev else None,
        "exclude": [path.name for path in config.exclude],
        "recipe": {**config.recipe(), "passage_tokens": prepared.source.passage_tokens},
    }
    with run.opened(identity):
        return _Adaptation(config, prepared, workers, run, identity, on_progress).run()


class _Adaptation:
    def __init__(
        self,
        config: BlockAdaptConfig,
        prepared: Preparation,
        workers: Workers,
        run: RunFolder,
        identity: dict[str, Any],
        on_progress: Callable[[StepMetrics], None] | None,
    ) -> None:
        self._config = config
        self._source = prepared.source
        self._workers = workers
        self._run = run
        self._identity = identity
        self._on_progress = on_progress
        if workers.device.type == "cpu":
            keep_freed_memory()
        model, self._tokenizer, token_ids = load_for_training(
            prepared.source, config, with_adapter=not config.lora_rank
        )
        limits = SampleLimits(
            min_passages=config.min_passages,
            max_passages=config.max_passages,
            passage_tokens=prepared.source.passage_tokens,
            max_tokens=min(config.max_tokens, prepared.source.plain_positions),
            refusal_share=config.refusal_share,
        )
        template = prepared.source.template
        self._samples = self._source_of_samples(prepared, limits)
        self._dev: list[Prompts] = []
        if prepared.dev:
            dev = SampleSource(prepared.dev, self._tokenizer, template, limits, f"{config.seed}/dev")
            self._dev = [dev.sample(number) for number in range(min(config.dev_rows, len(prepared.dev)))]
        self._trainer = BlockTrainer(model, token_ids, config, workers, prepared.source.adapter)
        self._log: MetricsLog | None = None
        self._reported: set[str] = set()

    def _source_of_samples(self, prepared: Preparation, limits: SampleLimits) -> SampleSource | ContextSource:
        config, template = self._config, prepared.source.template
        if config.questions == 1:
            return SampleSource(prepared.train, self._tokenizer, template, limits, config.seed)
        pieces = PieceMaker(template, self._tokenizer, limits.passage_tokens)
        pools = load_pools(data_files(config.data), pieces, config.exclude)
        shares = config.shares or (1.0,) * len(pools)
        return ContextSource(
            list(zip(pools, shares, strict=True)), self._tokenizer, template, limits, config.questions, config.seed
        )

    def run(self) -> Path:
        config = self._config
        state = self._run.restore(self._trainer.model, self._trainer.optimizer)
        self._reported = {place for record in self._run.records() for place in record.get("too_long", ())}
        if self._workers.rank == 0:
            self._log = MetricsLog(config.run_dir, tensorboard=config.tensorboard)
        try:
            before = self._before(state)
            after = self._train(state) if state.step < config.steps else (state, self._measure())
            return self._finish(after[0], before, after[1])
        finally:
            if self._log is not None:
                self._log.close()

    def _before(self, state: RunState) -> DevScores | None:
        """The scores before the first step; a continued run finds them in its metrics."""
        if state.step:
            found = [record["dev"] for record in self._run.records() if record["step"] == 0 and "dev" in record]
            return DevScores(**found[0]) if found else None
        scores = self._measure()
        self._report(StepMetrics(step=0, steps=self._config.steps, dev=scores))
        return scores

    def _train(self, state: RunState) -> tuple[RunState, DevScores | None]:
        config = self._config
        speeds: list[tuple[int, float]] = []
        with ThreadPoolExecutor(1) as drawing:  # the tokenizers library computes without the interpreter's lock
            ahead = drawing.submit(self._draw, state.step)
            while True:
                samples = ahead.result()
                started = time.perf_counter()
                if state.step + 1 < config.steps:
                    ahead = drawing.submit(self._draw, state.step + 1)
                factor = learning_rate_factor(state.step, state.step / config.steps, config.warmup_steps)
                losses = self._trainer.step(samples, config.learning_rate * factor)
                took = time.perf_counter() - started
                state = replace(
                    state, step=state.step + 1, tokens=state.tokens + losses.tokens, seconds=state.seconds + took
                )
                done = state.step == config.steps
                speeds = [*speeds, (losses.tokens, took)][-_SPEED_STEPS:]
                recent = sum(seconds for _, seconds in speeds)
                scores = self._measure() if done or state.step % config.eval_steps == 0 else None
                self._report(
                    StepMetrics(
                        step=state.step,
                        steps=config.steps,
                        block_loss=losses.block,
                        full_loss=losses.full,
                        distillation=losses.distillation,
                        gradient_norm=losses.gradient_norm,
                        learning_rate=config.learning_rate * factor,
                        tokens=state.tokens,
                        seconds=state.seconds,
                        tokens_per_second=sum(tokens for tokens, _ in speeds) / recent,
                        eta_seconds=(config.steps - state.step) * recent / len(speeds),
                        dev=scores,
                        too_long=self._newly_too_long(),
                    )
                )
                # after the report: what a checkpoint holds is in the metrics, and what came later is cut from them
                if done or state.step % config.checkpoint_steps == 0:
                    self._run.save(self._trainer.model, self._trainer.optimizer, state)
                if done:
                    return state, scores

    def _draw(self, step: int) -> list[Prompts]:
        """This worker's samples of a step."""
        first = step * self._config.batch_size
        mine = range(self._workers.rank, self._config.batch_size, self._workers.size)
        return [self._samples.sample(first + number) for number in mine]

    def _measure(self) -> DevScores | None:
        return self._trainer.measure(self._dev) if self._dev else None

    def _newly_too_long(self) -> dict[str, int]:
        found = dict(self._samples.too_long)
        fresh = {place: tokens for place, tokens in found.items() if place not in self._reported}
        self._reported.update(fresh)
        return fresh

    def _report(self, metrics: StepMetrics) -> None:
        if self._log is not None:
            self._log.write(metrics)
            if self._on_progress is not None:
                self._on_progress(metrics)

    def _finish(self, state: RunState, before: DevScores | None, after: DevScores | None) -> Path:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self._trainer.model, options=options)
        if self._workers.rank == 0:
            scores = {name: found for name, found in (("before", before), ("after", after)) if found is not None}
            training = {
                **self._identity,
                "tokens": state.tokens,
                "seconds": round(state.seconds),
                "workers": self._workers.size,
                "dev_scores": {name: asdict(found) for name, found in scores.items()},
                "rows_too_long": len({place for record in self._run.records() for place in record.get("too_long", ())}),
            }
            rank = self._config.lora_rank
            adapter = trained_adapter(weights, rank, self._source.adapter) if rank else None
            write_bundle(weights, self._tokenizer, self._source, self._config, training, scores, adapter)
            self._run.drop_checkpoints()
        self._workers.barrier()
        return self._config.out
