"""``adapt_block``: adapt a checkpoint to block attention, or go on with a run that was stopped; its steps, its
measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.errors import SetupError
from blockrag.evaluation.drawing import PieceMaker
from blockrag.modeling.adapter import Adapter
from blockrag.modeling.bundle import file_sha256
from blockrag.training.adaptation.batch import Batch, Context, distillation, make_batch, score_answers
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.adaptation.contexts import ContextSource, load_pools
from blockrag.training.adaptation.samples import Row, SampleLimits, SampleSource, data_files, hold_out_rows, read_rows
from blockrag.training.adaptation.source import Source, load_for_training, open_source, write_bundle
from blockrag.training.adaptation.visibility import Mask, TrainingAttention
from blockrag.training.configuring import in_bfloat16
from blockrag.training.loop import Schedule, StepResult, train
from blockrag.training.lora import add_lora, trained_adapter
from blockrag.training.run import OnProgress, RunFolder, Scores, read_records, whole_weights
from blockrag.training.workers import Workers, like_parameter, switch_off_dropout, take_step

_Part = tuple[Batch, tuple[Mask, ...]]
"""A micro-batch, and the masks it is trained under, in this order."""


class BlockTrainer:
    """Model and optimiser of one worker.

    The full mask goes first, because its logits teach the block mask's in a distillation. The loss is the mean over all
    answer tokens of a step, so the learning rate means the same whether one mask or both are trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int],
        config: BlockAdaptConfig,
        workers: Workers,
        adapter: Adapter | None = None,
    ) -> None:
        """``token_ids``: the link and sink tokens, the only rows of the embedding that change when an adapter or these
        tokens alone are trained. ``adapter``: what an adapter goes on from."""
        self.model = model
        self._config = config
        self._workers = workers
        self._attention = TrainingAttention(config.attention, workers.device)
        self._attention.install(model)
        self._dtype = torch.bfloat16 if in_bfloat16(config.precision, workers.device.type) else torch.float32
        # a few steps of fine-tuning do without, FlexAttention has none, and a resumed run draws no other numbers
        switch_off_dropout(model)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if config.lora_rank:
            add_lora(model, config.lora_rank, seed=config.seed, start=adapter)
            model.get_input_embeddings().weight.requires_grad_(bool(token_ids))
            if workers.size == 1 and not token_ids:  # FSDP2 wants a layer's parameters in one type; so do new rows
                model.to(self._dtype)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.float()  # small updates would be lost in bfloat16
        if config.train == "tokens":
            model.requires_grad_(False)
            model.get_input_embeddings().weight.requires_grad_(True)
        model.to(workers.device)
        workers.shard(model, model.model.layers)
        self._rows = self._trained_rows(token_ids) if config.train == "tokens" or config.lora_rank else None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # no weight decay: it would pull a pretrained model towards zero for reasons that the few steps cannot weigh
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, samples: Sequence[Context], learning_rate: float) -> StepResult:
        """One update from this worker's part of a step's samples; every worker must bring as many."""
        batches = list(self._batches(samples))
        counts = torch.zeros(3)  # answer tokens under the block mask, under the full mask, tokens
        for batch, masks in batches:
            counts += torch.tensor(
                [batch.answer_tokens * ("block" in masks), batch.answer_tokens * ("full" in masks), batch.tokens]
            )
        block_answers, full_answers, tokens = self._workers.sum(counts).tolist()
        # FSDP2 averages the workers' gradients; the loss is to be the mean over all answer tokens of the step
        scale = self._workers.size / (block_answers + full_answers)
        self.model.train()
        passes = self._in_threads(lambda one: self._pass(*one, scale), batches)
        sums = torch.stack(passes).sum(0) if passes else torch.zeros(3)
        embeddings = self.model.get_input_embeddings().weight
        if self._rows is not None and embeddings.grad is not None:
            embeddings.grad.mul_(self._rows)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = take_step(trained, [(self.optimizer, learning_rate)])
        block, full, divergence_sum = self._workers.sum(sums).tolist()
        losses = {}
        if block_answers:
            losses["block"] = block / block_answers
        if full_answers:
            losses["full"] = full / full_answers
        if self._config.distillation:
            losses["distillation"] = divergence_sum / block_answers
        return StepResult(losses, norm, round(tokens) * (2 if self._config.masks == "both" else 1))

    def _pass(self, batch: Batch, masks: tuple[Mask, ...], scale: float) -> Tensor:
        """Add the gradients of a micro-batch; gives its sums of losses: block mask, full mask, distillation."""
        sums = {"block": 0.0, "full": 0.0, "distillation": 0.0}
        teacher: Tensor | None = None
        for mask in masks:
            logits = self._logits(batch, mask)
            loss = score_answers(logits, batch).loss
            sums[mask] += float(loss.detach())
            if teacher is not None and self._config.distillation:
                divergence = distillation(logits, teacher, batch.targets)
                sums["distillation"] += float(divergence.detach())
                loss = loss + self._config.distillation * divergence
            teacher = logits.detach()
            (loss * scale).backward()
        return torch.tensor(list(sums.values()), dtype=torch.float64)

    def _in_threads(self, function: Callable[[_Part], Tensor], parts: Sequence[_Part]) -> list[Tensor]:
        """``function`` of each part; with ``config.threads`` above 1 of so many at a time, each on one core.

        Torch's own threads meet after every operation, and a core that is shared with another process holds up both.
        Gradients are added under a lock (in no fixed order, so that a run is repeated to rounding only).
        """
        if self._config.threads == 1:
            return [function(part) for part in parts]
        with ThreadPoolExecutor(self._config.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, parts))

    @torch.no_grad()
    def measure(self, samples: Sequence[Context]) -> Scores:
        """By mask, nats per answer token and the share of answers that greedy decoding would give exactly.

        The same on every worker; ``samples`` are shared out among them.
        """
        self.model.train(False)
        size, rank = self._workers.size, self._workers.rank
        rounds = -(-len(samples) // size)
        sums = torch.zeros(6, dtype=torch.float64)
        for number in range(rank, rounds * size, size):
            # every worker makes as many passes, because each one gathers the others' parameters
            batch = make_batch([samples[number % len(samples)]], self._attention.multiple).to(self._workers.device)
            block = score_answers(self._logits(batch, "block"), batch)
            full = score_answers(self._logits(batch, "full"), batch)
            if number < len(samples):
                found = torch.stack([block.loss, full.loss, block.exact, full.exact]).double().cpu()
                sums += torch.cat([torch.tensor([batch.answer_tokens, batch.count], dtype=torch.float64), found])
        tokens, answers, block_loss, full_loss, block_exact, full_exact = self._workers.sum(sums).tolist()
        return {
            "block": {"nats": block_loss / tokens, "exact": block_exact / answers},
            "full": {"nats": full_loss / tokens, "exact": full_exact / answers},
        }

    def _logits(self, batch: Batch, mask: Mask) -> Tensor:
        """Logits [B, P, V] of the places that predict the batch's targets."""
        frozen = self.model.model.norm.weight.dtype
        narrow = self._dtype == torch.bfloat16 and frozen != torch.bfloat16
        with torch.autocast(self._workers.device.type, torch.bfloat16, enabled=narrow):
            output = self.model(
                input_ids=batch.input_ids,
                attention_mask=self._attention.mask(batch.segments, mask, self._dtype),
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.predicted,
            )
        logits: Tensor = output.logits
        return logits

    def _batches(self, samples: Sequence[Context]) -> Iterator[_Part]:
        """Micro-batches of samples of about the same length, with the masks they are trained under."""
        size = self._config.micro_batch
        for masks, chosen in self._by_mask(samples):
            ordered = sorted(chosen, key=lambda sample: sample.tokens)
            for start in reversed(range(0, len(ordered), size)):  # longest first, so that threads end together
                batch = make_batch(ordered[start : start + size], self._attention.multiple)
                yield batch.to(self._workers.device), masks

    def _by_mask(self, samples: Sequence[Context]) -> list[tuple[tuple[Mask, ...], Sequence[Context]]]:
        match self._config.masks:
            case "both":
                return [(("full", "block"), samples)]
            case "mixed":
                # by the place in the whole step, of which this worker has every size-th sample
                size, rank = self._workers.size, self._workers.rank
                parts: dict[Mask, list[Context]] = {"full": [], "block": []}
                for place, sample in enumerate(samples):
                    parts["full" if (place * size + rank) % 3 == 2 else "block"].append(sample)
                return [((mask,), chosen) for mask, chosen in parts.items()]
            case mask:
                return [((mask,), samples)]

    def _trained_rows(self, token_ids: Sequence[int]) -> Tensor:
        """1 for the rows of the embedding that are trained, 0 elsewhere; [vocabulary, 1]."""
        weight = self.model.get_input_embeddings().weight
        rows = torch.zeros(weight.shape[0], 1)
        rows[list(token_ids)] = 1.0
        return like_parameter(rows, weight)


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
    workers = workers or Workers(config.device)
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
        weights = whole_weights(learner.model)
        if workers.rank == 0:
            scores = {when: found for when, found in run.scores().items() if found}
            training = {
                **identity,
                "tokens": state.tokens,
                "seconds": round(state.seconds),
                "workers": workers.size,
                "dev_scores": scores,
                "rows_too_long": len(
                    {place for record in read_records(run.path) for place in record.get("left_out", ())}
                ),
            }
            before = prepared.source.adapter
            adapter = trained_adapter(weights, config.lora_rank, before) if config.lora_rank else None
            write_bundle(weights, learner.tokenizer, prepared.source, config, training, scores, adapter)
            run.drop_checkpoints()
        workers.barrier()
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
