"""``adapt_block``: adapt a checkpoint to block attention, or go on with a run that was stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockrag.errors import SetupError
from blockrag.evaluation.pieces import PieceMaker
from blockrag.modeling.bundle import file_sha256
from blockrag.training.adaptation.batch import Context
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.adaptation.block_trainer import BlockTrainer
from blockrag.training.adaptation.contexts import ContextSource, load_pools
from blockrag.training.adaptation.samples import Row, SampleLimits, SampleSource, data_files, hold_out_rows, read_rows
from blockrag.training.adaptation.source import Source, load_for_training, open_source
from blockrag.training.adaptation.writing import write_bundle
from blockrag.training.loop import Schedule, StepResult, train
from blockrag.training.lora import trained_adapter
from blockrag.training.run import OnProgress, RunFolder, RunState, Scores, whole_weights
from blockrag.training.workers import OneWorker, Workers


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
    return Preparation(source, *hold_out_rows(rows, config.dev_rows, config.seed))


def adapt_block(
    config: BlockAdaptConfig,
    workers: Workers | None = None,
    on_progress: OnProgress | None = None,
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
        learner = _Learner(config, prepared, workers)
        state = train(learner, Schedule.of(config), run, workers, on_progress, tensorboard=config.tensorboard)
        _finish(config, prepared.source, learner, state, run, identity, workers)
    return config.out


class _Learner:
    """What ``train`` trains: a model under the block mask, the full mask or both."""

    def __init__(self, config: BlockAdaptConfig, prepared: Preparation, workers: Workers) -> None:
        self._config = config
        self._workers = workers
        model, self.tokenizer, token_ids = load_for_training(prepared.source, config, with_adapter=not config.lora_rank)
        limits = SampleLimits(
            min_passages=config.min_passages,
            max_passages=config.max_passages,
            passage_tokens=prepared.source.passage_tokens,
            max_tokens=min(config.max_tokens, prepared.source.plain_positions),
            refusal_share=config.refusal_share,
        )
        self._samples = self._source_of_samples(prepared, limits)
        self._dev: list[Context] = []
        if prepared.dev:
            dev = SampleSource(prepared.dev, self.tokenizer, prepared.source.template, limits, f"{config.seed}/dev")
            self._dev = [dev.sample(number) for number in range(min(config.dev_rows, len(prepared.dev)))]
        self._trainer = BlockTrainer(model, token_ids, config, workers, prepared.source.adapter)
        self.model = model
        self.optimizers = [self._trainer.optimizer]

    def _source_of_samples(self, prepared: Preparation, limits: SampleLimits) -> SampleSource | ContextSource:
        config, template = self._config, prepared.source.template
        if config.questions == 1:
            return SampleSource(prepared.train, self.tokenizer, template, limits, config.seed)
        pieces = PieceMaker(template, self.tokenizer, limits.passage_tokens)
        pools = load_pools(data_files(config.data), pieces, config.exclude)
        shares = config.shares or (1.0,) * len(pools)
        return ContextSource(
            list(zip(pools, shares, strict=True)), self.tokenizer, template, limits, config.questions, config.seed
        )

    def draw(self, step: int, fraction: float) -> list[Context]:
        first = step * self._config.batch_size
        mine = range(self._workers.rank, self._config.batch_size, self._workers.size)
        return [self._samples.sample(first + number) for number in mine]

    def step(self, samples: list[Context], factor: float) -> StepResult:
        result = self._trainer.step(samples, self._config.learning_rate * factor)
        return replace(result, left_out=dict(self._samples.too_long))

    def measure(self) -> Scores:
        return self._trainer.measure(self._dev) if self._dev else {}


def _finish(
    config: BlockAdaptConfig,
    source: Source,
    learner: _Learner,
    state: RunState,
    run: RunFolder,
    identity: Mapping[str, Any],
    workers: Workers,
) -> None:
    weights = whole_weights(learner.model)
    if workers.rank == 0:
        scores = {when: found for when, found in zip(("before", "after"), run.scores(), strict=True) if found}
        training = {
            **identity,
            "tokens": state.tokens,
            "seconds": round(state.seconds),
            "workers": workers.size,
            "dev_scores": scores,
            "rows_too_long": len({place for record in run.records() for place in record.get("left_out", ())}),
        }
        adapter = trained_adapter(weights, config.lora_rank, source.adapter) if config.lora_rank else None
        write_bundle(weights, learner.tokenizer, source, config, training, scores, adapter)
        run.drop_checkpoints()
    workers.barrier()
