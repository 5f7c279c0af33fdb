"""One step of a stage: the parts of its samples, their gradients, the update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn, optim

from blockrag.training.configuring import in_bfloat16
from blockrag.training.loop import StepResult
from blockrag.training.lora import add_lora
from blockrag.training.refrag.refrag_reader import RefragReader, SampleLosses, SampleScores
from blockrag.training.refrag.stage_config import RefragConfig
from blockrag.training.refrag.stage_samples import Kind, RefragSample
from blockrag.training.workers import Workers, like_parameter, take_step

_TEXT_WEIGHT = 0.5
"""Weight of texts beside answers, both taken per token."""
_KINDS: tuple[Kind, ...] = ("text", "answers")


class RefragTrainer:
    """Trains a reader of compositions. Every worker has one; on a CPU a single worker uses a thread per part."""

    def __init__(self, reader: RefragReader, config: RefragConfig, workers: Workers) -> None:
        """Freezes what the stage leaves alone."""
        self.reader = reader
        self._config = config
        self._workers = workers
        self._device = workers.device.type
        reader.decoder.requires_grad_(config.decoder_learns)
        if config.lora_rank:
            add_lora(reader.decoder.model, config.lora_rank, seed=config.seed)
        reader.distillation = config.distillation
        reader.to(workers.device)
        # As one piece: how often a layer runs depends on a worker's samples, and FSDP wants all workers alike. Weights
        # are whole during a step; the optimiser's state and the weights it updates are shared out.
        reader.sharded = workers.size > 1
        workers.shard(reader, nn.ModuleList())
        self._rates = self._build_optimizers()
        self.optimizers: list[optim.Optimizer] = [optimizer for optimizer, _ in self._rates]
        self._parameters = [parameter for parameter in reader.parameters() if parameter.requires_grad]
        self._pool = ThreadPoolExecutor(config.parts, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, samples: Sequence[RefragSample], factor: float) -> StepResult:
        """One update from a step's samples, which every worker is given whole; ``factor`` is on the learning rates."""
        parts = split_parts(samples, self._config.parts)
        mine = parts[self._workers.rank :: self._workers.size]
        counts = count_targets(samples)
        weights = _weights(counts)
        sums = dict.fromkeys(_KINDS, 0.0)
        divergence = 0.0
        if self._workers.size == 1 and self._device == "cpu":
            results = self._threaded(mine, weights)
        else:
            results = [self._backward(part, weights, samples[:1]) for part in mine]
        for result in results:
            losses = result.losses.detach().cpu()
            for kind in _KINDS:
                sums[kind] += float(losses[torch.from_numpy(result.kinds == kind)].double().sum())
            divergence += float(result.divergences.double().sum())
        norm = take_step(self._parameters, [(optimizer, rate * factor) for optimizer, rate in self._rates])
        summed = torch.tensor([*(sums[kind] for kind in _KINDS), divergence], dtype=torch.float64)
        *totals, divergence = self._workers.sum(summed).tolist()
        measured: dict[str, float] = {
            kind: total / counts[kind] for kind, total in zip(_KINDS, totals, strict=True) if counts[kind]
        }
        if self.reader.distillation > 0 and counts["text"]:
            measured["divergence"] = divergence / counts["text"]
        return StepResult(
            losses=measured,
            gradient_norm=norm,
            tokens=sum(sample.tokens for sample in samples),
        )

    @torch.no_grad()
    def score(self, samples: Sequence[RefragSample]) -> SampleScores:
        """Scores of all samples, in order; every worker computes all of them."""
        tokens = max(1, self._config.tokens_per_step // self._config.parts)
        batches: list[list[RefragSample]] = [[]]
        for sample in samples:
            if batches[-1] and sum(s.tokens for s in batches[-1]) + sample.tokens > tokens:
                batches.append([])
            batches[-1].append(sample)
        if self._workers.size == 1 and self._device == "cpu":
            found = list(self._pool.map(self._score, batches))
        else:
            found = [self._score(batch) for batch in batches]
        return SampleScores(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def average(self, weights: Mapping[str, Tensor], share: float) -> None:
        """Make the decoder ``share`` of itself and the rest of ``weights``, by the names of its own parameters."""
        for name, parameter in self.reader.decoder.model.named_parameters():
            other = like_parameter(weights[name].to(parameter.dtype), parameter)
            parameter.mul_(share).add_(other, alpha=1 - share)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _threaded(self, parts: Sequence[list[RefragSample]], weights: Mapping[Kind, float]) -> list[SampleLosses]:
        def run(part: list[RefragSample]) -> tuple[SampleLosses, tuple[Tensor | None, ...]]:
            result = self._losses(part, weights)
            if not result.total.requires_grad:  # the decoder is frozen and nothing of this part is compressed
                return result, (None,) * len(self._parameters)
            return result, torch.autograd.grad(result.total, self._parameters, allow_unused=True)

        results = list(self._pool.map(run, [part for part in parts if part]))
        # Summed in the order of the parts, so that the result does not depend on which thread was faster.
        for number, parameter in enumerate(self._parameters):
            found = [gradients[number] for _, gradients in results]
            present = [gradient for gradient in found if gradient is not None]
            parameter.grad = torch.stack(present).sum(0) if present else None
        return [result for result, _ in results]

    def _backward(
        self, part: list[RefragSample], weights: Mapping[Kind, float], filler: Sequence[RefragSample]
    ) -> SampleLosses:
        """Add a part's gradients. Without samples, ``filler`` is read for nothing: all workers must go through FSDP."""
        if not part:
            self._losses(filler, dict.fromkeys(_KINDS, 0.0)).total.backward()
            return SampleLosses(torch.zeros(()), torch.zeros(0), torch.zeros(0), np.zeros(0, np.str_))
        result = self._losses(part, weights)
        if result.total.requires_grad:
            # FSDP2 averages the workers' gradients; the weights are those of a sum over the whole step
            (result.total * self._workers.size).backward()
        return result

    def _losses(self, part: Sequence[RefragSample], weights: Mapping[Kind, float]) -> SampleLosses:
        with self._autocast():
            result = self.reader(part, weights)
        assert isinstance(result, SampleLosses)
        return result

    def _score(self, samples: Sequence[RefragSample]) -> SampleScores:
        with torch.no_grad(), self._autocast():
            result = self.reader(samples, None)
        assert isinstance(result, SampleScores)
        return result

    def _autocast(self) -> torch.autocast:
        # Autocast's cache of half-precision weights is shared between threads, and so would the graphs be.
        enabled = in_bfloat16(self._config.precision, self._device)
        return torch.autocast(self._device, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _build_optimizers(self) -> list[tuple[optim.Optimizer, float]]:
        """Optimizers with their peak learning rates. An encoder that came trained learns as slowly as the decoder."""
        config, reader = self._config, self.reader
        slow = nn.ModuleList([reader.decoder] if config.decoder_learns else [])
        fast = nn.ModuleList([reader.projector])
        (slow if reader.encoder.alignment == "text" else fast).append(reader.encoder)
        return [
            (optimizer, rate)
            for modules, rate in ((slow, config.decoder_learning_rate), (fast, config.learning_rate))
            if len(modules)
            for optimizer in build_optimizers(modules, config.optimizer, rate)
        ]


def split_parts(samples: Sequence[RefragSample], parts: int) -> list[list[RefragSample]]:
    """Samples in parts of about as many tokens each; long ones are dealt first."""
    found: list[list[RefragSample]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for sample in sorted(samples, key=lambda sample: -sample.tokens):
        least = sizes.index(min(sizes))
        found[least].append(sample)
        sizes[least] += sample.tokens
    return found


def count_targets(samples: Sequence[RefragSample]) -> Counter[str]:
    """Target tokens by kind."""
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[sample.kind] += sum(len(branch.answer) for view in sample.views for branch in view.branches)
    return counts


def _weights(counts: Mapping[str, int]) -> dict[Kind, float]:
    """Weight of a target token by kind, so that the loss is a sum of means."""
    both = all(counts.get(kind) for kind in _KINDS)
    shares: dict[Kind, float] = {"text": _TEXT_WEIGHT if both else 1.0, "answers": 1.0}
    return {kind: share / max(1, counts.get(kind, 0)) for kind, share in shares.items()}


def build_optimizers(model: nn.Module, name: str, learning_rate: float) -> list[torch.optim.Optimizer]:
    """The optimisers that share the trainable parameters of ``model``.

    ``adamw`` alone, or ``muon`` for the matrices inside the layers, scaled so that an update has the size AdamW's
    would have and the learning rate carries over (Moonlight, arXiv 2502.16982, section 2.2). Weight decay acts on
    matrices only.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [p for n, p in trained if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in trained if p.ndim == 2 and "embed" in n]
    vectors = [p for _, p in trained if p.ndim < 2]
    plain = {"params": vectors, "weight_decay": 0.0}
    if name == "adamw":
        decayed = {"params": matrices + embeddings, "weight_decay": 0.1}
        return [torch.optim.AdamW([decayed, plain], lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    if name == "muon":
        muon = torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        rest = {"params": embeddings, "weight_decay": 0.1}
        return [muon, torch.optim.AdamW([rest, plain], lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    raise ValueError(f"unknown optimizer {name!r}: adamw or muon")
