"""One optimiser step of an adaptation, and the measuring between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.modeling.adapter import Adapter
from blockrag.training.adaptation.batch import Batch, Context, distillation, make_batch, score_answers
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.adaptation.visibility import Mask, TrainingAttention
from blockrag.training.loop import StepResult
from blockrag.training.lora import add_lora
from blockrag.training.run import Scores
from blockrag.training.workers import Workers, like_parameter, take_step

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
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        _switch_off_dropout(model)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if config.lora_rank:
            add_lora(model, config.lora_rank, seed=config.seed, start=adapter)
            model.get_input_embeddings().weight.requires_grad_(bool(token_ids))
            if workers.size == 1 and not token_ids:  # FSDP2 wants a layer's parameters in one type; so do new rows
                model.to(self._dtype)
                _widen_trained(model)
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
        norm = self._update(learning_rate)
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

    def _update(self, learning_rate: float) -> float:
        """Clip, step and clear; gives the gradient's norm."""
        embeddings = self.model.get_input_embeddings().weight
        if self._rows is not None and embeddings.grad is not None:
            embeddings.grad.mul_(self._rows)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return take_step(trained, [(self.optimizer, learning_rate)])

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


def _widen_trained(model: nn.Module) -> None:
    """Small updates would be lost in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
