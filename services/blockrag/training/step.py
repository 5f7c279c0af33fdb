"""One update of the reader from the parts of a step, shared out to threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from blockrag.training.attention import additive_mask
from blockrag.training.evidence import EvidenceLosses, watched_layers
from blockrag.training.loss import linear_cross_entropy
from blockrag.training.packing import IGNORED, PackedBatch


@dataclass(frozen=True)
class Part:
    """The places of a part of a step whose loss counts; N of them."""

    batch: PackedBatch
    places: torch.Tensor
    """[B, T] bool."""
    answers: torch.Tensor
    """[N] bool: whether the place predicts an answer's token."""
    weights: torch.Tensor
    """[N] float32, not yet divided by how many there are of their kind in the whole step."""
    targets: torch.Tensor
    """[N] int64."""

    @classmethod
    def choose(cls, batch: PackedBatch, share: float, generator: torch.Generator) -> Part:
        """All answer places and a random ``share`` of the others."""
        is_answer = batch.branches >= 0
        kept = torch.rand(batch.weights.shape, generator=generator) < share
        places = (batch.targets != IGNORED) & (is_answer | kept)
        return cls(batch, places, is_answer[places], batch.weights[places], batch.targets[places])


def hidden_states(
    model: LlamaForCausalLM, batch: PackedBatch, device: str, evidence: EvidenceLosses | None = None
) -> torch.Tensor:
    """Last hidden states [B, T, width] of the rows of ``batch``; ``evidence`` gets to see the attention."""
    output = model.model(
        input_ids=batch.input_ids.to(device),
        attention_mask=additive_mask(batch.mask(device), torch.bfloat16),
        position_ids=batch.position_ids.to(device),
        use_cache=False,
        evidence=evidence,
    )
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def update(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    parts: list[Part],
    pool: ThreadPoolExecutor,
    device: str,
    evidence_weight: float = 0.0,
) -> tuple[float, float]:
    """One update from the parts of a step; gives the mean losses per answer token and per other token, in nats.

    ``evidence_weight``: of the mean loss of a question's evidence in each layer, beside the answers' weight of 1.
    """
    answers, others = (sum(int((part.answers == kind).sum()) for part in parts) for kind in (True, False))
    questions = sum(len(row.asked) for part in parts for row in part.batch.evidence)
    watched = watched_layers(model.config.num_hidden_layers)
    parameters = list(model.parameters())

    def run(part: Part) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        weights = part.weights / torch.where(part.answers, max(1, answers), max(1, others))
        # Autocast's cache of half-precision weights is shared between threads, and so would the graphs be.
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            evidence = EvidenceLosses(part.batch.evidence, watched) if evidence_weight else None
            hidden = hidden_states(model, part.batch, device, evidence)[part.places.to(device)].to(torch.bfloat16)
            total, losses = linear_cross_entropy(
                hidden, model.lm_head.weight, part.targets.to(device), weights.to(device)
            )
            found = evidence.total() if evidence is not None else None
            if found is not None:
                total = total + found * (evidence_weight / questions)
        return torch.autograd.grad(total, parameters), losses.cpu()

    results = list(pool.map(run, parts))
    # Summed in the order of the parts, so that the result does not depend on which thread was faster.
    for number, parameter in enumerate(parameters):
        summed = results[0][0][number]
        for gradients, _ in results[1:]:
            summed += gradients[number]
        parameter.grad = summed
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    losses, is_answer = torch.cat([found for _, found in results]), torch.cat([part.answers for part in parts])
    return float(losses[is_answer].mean()), float(losses[~is_answer].mean())
