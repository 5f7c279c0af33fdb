"""One optimiser step of an adaptation, and the measuring between steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.training.adaptation.batch import Batch, make_batch
from blockrag.training.adaptation.config import BlockAdaptConfig
from blockrag.training.adaptation.masks import Mask, TrainingAttention
from blockrag.training.adaptation.metrics import DevScores
from blockrag.training.adaptation.objective import distillation, score_answers
from blockrag.training.adaptation.samples import Sample
from blockrag.training.adaptation.workers import Workers, like_parameter, whole

_CLIP = 1.0


@dataclass(frozen=True)
class StepLosses:
    """What a step found, over all workers."""

    block: float | None
    """Nats per answer token under the block mask; None where it was not trained."""
    full: float | None
    distillation: float | None
    gradient_norm: float
    tokens: int
    """Trained tokens, counted once per mask."""


class BlockTrainer:
    """Model and optimiser of one worker.

    The full mask goes first, because its logits teach the block mask's in a distillation. Each mask's loss counts
    half, so the learning rate means the same whether one or both are trained.
    """

    def __init__(
        self, model: PreTrainedModel, token_ids: Sequence[int], config: BlockAdaptConfig, workers: Workers
    ) -> None:
        """``token_ids``: the link and sink tokens; the only rows that change when ``config.train`` is "tokens"."""
        self.model = model
        self._config = config
        self._workers = workers
        self._attention = TrainingAttention(config.attention, workers.device)
        self._attention.install(model)
        self._masks: tuple[Mask, ...] = ("full", "block") if config.masks == "both" else (config.masks,)
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        _switch_off_dropout(model)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if config.train == "tokens":
            model.requires_grad_(False)
            model.get_input_embeddings().weight.requires_grad_(True)
        model.to(workers.device)
        workers.shard(model, model.model.layers)
        self._rows = self._trained_rows(token_ids) if config.train == "tokens" else None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # no weight decay: it would pull a pretrained model towards zero for reasons that the few steps cannot weigh
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, samples: Sequence[Sample], learning_rate: float) -> StepLosses:
        """One update from this worker's part of a step's samples; every worker must bring as many."""
        batches = list(self._batches(samples))
        counts = [sum(batch.answer_tokens for batch in batches), sum(batch.tokens for batch in batches)]
        answers, tokens = self._workers.sum(torch.tensor(counts)).tolist()
        # FSDP2 averages the workers' gradients; the loss is to be the mean over all answer tokens of the step
        scale = self._workers.size / answers / len(self._masks)
        self.model.train()
        sums = {"block": 0.0, "full": 0.0, "distillation": 0.0}
        for batch in batches:
            teacher: Tensor | None = None
            for mask in self._masks:
                logits = self._logits(batch, mask)
                loss = score_answers(logits, batch.targets).loss
                sums[mask] += float(loss.detach())
                if teacher is not None and self._config.distillation:
                    divergence = distillation(logits, teacher, batch.targets)
                    sums["distillation"] += float(divergence.detach())
                    loss = loss + self._config.distillation * divergence
                teacher = logits.detach()
                (loss * scale).backward()
        norm = self._update(learning_rate)
        block, full, divergence_sum = (self._workers.sum(torch.tensor(list(sums.values()))) / answers).tolist()
        return StepLosses(
            block=block if "block" in self._masks else None,
            full=full if "full" in self._masks else None,
            distillation=divergence_sum if self._config.distillation else None,
            gradient_norm=norm,
            tokens=round(tokens) * len(self._masks),
        )

    @torch.no_grad()
    def measure(self, samples: Sequence[Sample]) -> DevScores:
        """Scores on ``samples``, the same on every worker, shared out among them."""
        self.model.train(False)
        size, rank = self._workers.size, self._workers.rank
        rounds = -(-len(samples) // size)
        sums = torch.zeros(5, dtype=torch.float64)
        for number in range(rank, rounds * size, size):
            # every worker makes as many passes, because each one gathers the others' parameters
            batch = make_batch([samples[number % len(samples)]], self._attention.multiple).to(self._workers.device)
            block = score_answers(self._logits(batch, "block"), batch.targets)
            full = score_answers(self._logits(batch, "full"), batch.targets)
            if number < len(samples):
                found = torch.stack([block.loss, full.loss, block.exact, full.exact]).double().cpu()
                sums += torch.cat([torch.tensor([float(batch.answer_tokens)]), found])
        answers, block_loss, full_loss, block_exact, full_exact = self._workers.sum(sums).tolist()
        return DevScores(
            block_loss=block_loss / answers,
            full_loss=full_loss / answers,
            block_exact=block_exact / len(samples),
            full_exact=full_exact / len(samples),
        )

    def _logits(self, batch: Batch, mask: Mask) -> Tensor:
        """Logits [B, K, V] of the places that predict the batch's targets."""
        with torch.autocast(self._workers.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            output = self.model(
                input_ids=batch.input_ids,
                attention_mask=self._attention.mask(batch.segments, mask, self._dtype),
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logits_to_keep,
            )
        logits: Tensor = output.logits[:, :-1]
        return logits

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        """Micro-batches of samples of about the same length."""
        ordered = sorted(samples, key=lambda sample: sample.tokens)
        size = self._config.micro_batch
        for start in range(0, len(ordered), size):
            batch = make_batch(ordered[start : start + size], self._attention.multiple)
            yield batch.to(self._workers.device)

    def _update(self, learning_rate: float) -> float:
        """Clip, step and clear; gives the gradient's norm."""
        embeddings = self.model.get_input_embeddings().weight
        if self._rows is not None and embeddings.grad is not None:
            embeddings.grad.mul_(self._rows)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = float(whole(nn.utils.clip_grad_norm_(trained, _CLIP)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _trained_rows(self, token_ids: Sequence[int]) -> Tensor:
        """1 for the rows of the embedding that are trained, 0 elsewhere; [vocabulary, 1]."""
        weight = self.model.get_input_embeddings().weight
        rows = torch.zeros(weight.shape[0], 1)
        rows[list(token_ids)] = 1.0
        return like_parameter(rows, weight)


def _switch_off_dropout(model: PreTrainedModel) -> None:
    """A few steps of fine-tuning do without, FlexAttention has none, and a resumed run draws no other numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
