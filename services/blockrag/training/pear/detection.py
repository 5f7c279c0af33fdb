"""Finding heads that suppress copying.

At the position that predicts the second copy's last token, one head's output is replaced by its mean and everything
else is left as in the clean run; π = logit[target] − mean(logits) there, averaged over the samples; Δπ = π̃/π − 1,
averaged over the sizes. Heads with the largest positive Δπ suppress copying.

As in the published code, "everything else" includes the outputs of the later layers' heads (path patching): only MLPs
and norms react (``later_heads="frozen"``). With ``"live"`` the later heads attend anew, which counts what they do to
make up for the missing head.

All heads in minutes: the clean run is done once and leaves, for the one position that predicts, every layer's input
and every head's output, and (for "live") K and V of the tokens before. A replaced head changes only this position's
residual stream, and only from its own layer on. So all heads of a layer times all samples are one batch of single
tokens that enters at that layer: the layers below are passed through, the prefix is never run again, and with frozen
heads it is not even attended to. For L layers of H heads and N prompts of 2n tokens that is L·H·N single tokens
through L/2 layers on average instead of L·H·N prompts through L layers, a factor of 4n. For an 8B model with 1,024
heads and the published 240 prompts: 246,000 tokens through half of the model, 2·10^15 operations; by count well under
a minute on a GPU (not measured). The published code runs several full passes per head.

Source: PEAR (arXiv 2409.19745), §3.1 and its code, which takes the mean over the batch; the text, over the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from blockrag.modeling.pear import AttentionHeads, attention_heads
from blockrag.training.pear.passes import ProxyTask, cache_of, check_length, forward, prefill, recording
from blockrag.training.pear.pear_config import LaterHeads, Mean, PearConfig


@dataclass(frozen=True)
class Detection:
    """Δπ of every head."""

    delta_pi: Tensor
    """float64 [layers, heads], on the CPU."""
    pi: tuple[float, ...]
    """Clean π of each size; at 0 or below the model does not copy, and Δπ is taken relative to |π|."""
    accuracy: float
    """Share of prompts whose last token the clean run predicts."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"delta_pi": self.delta_pi.tolist(), "pi": list(self.pi), "accuracy": self.accuracy}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Detection:
        """Of what ``to_dict`` gave."""
        return cls(torch.tensor(values["delta_pi"], dtype=torch.float64), tuple(values["pi"]), values["accuracy"])

    def ranked(self) -> list[tuple[int, int, float]]:
        """(layer, head, Δπ), largest first."""
        heads = self.delta_pi.shape[1]
        values, order = self.delta_pi.flatten().sort(descending=True, stable=True)
        return [
            (place // heads, place % heads, value) for place, value in zip(order.tolist(), values.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class _CleanRun:
    """Of the position that predicts, in prompts of one size."""

    tokens: Tensor
    """[samples, 1]"""
    position: int
    targets: Tensor
    """[samples]"""
    logits: Tensor
    hidden: list[Tensor]
    """Input of each layer, [samples, 1, width]."""
    heads: list[Tensor]
    """Heads' outputs in each layer, [samples, heads, head_dim]."""
    means: list[Tensor]
    """What replaces them, of the same shape."""
    prefix: list[tuple[Tensor, Tensor]]
    """K and V before the position."""
    layer_outputs: int | None
    """Values that a layer returns; None for a tensor that is not in a tuple."""


@torch.inference_mode()
def detect(
    model: PreTrainedModel,
    candidates: Tensor,
    config: PearConfig,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Detection:
    """Δπ of every head on prompts of ``candidates``, int64 [any], under ``config``'s mask; the model is left as it was.

    ``on_progress`` gets the share done. Raises UnsupportedModelError, and InvalidRequestError for too few candidates or
    prompts longer than the model's positions.
    """
    heads = attention_heads(model)
    tasks = [(samples, ProxyTask(n, config.mask, config.distractors)) for samples, n in config.sizes]
    for _, task in tasks:
        check_length(model, task.length)
    generator = torch.Generator().manual_seed(config.seed)
    steps = len(tasks) * len(heads.layers)
    changes, scores, hits = [], [], []
    for number, (samples, task) in enumerate(tasks):
        tokens = task.draw(samples, candidates, generator).to(model.device)
        clean = _clean_run(model, heads, task, tokens, config.mean)
        score = float(_score(clean.logits, clean.targets).mean())
        rows = []
        for layer in range(len(heads.layers)):
            rows.append(_replaced(model, heads, clean, layer, config).mean(1))
            on_progress((number * len(heads.layers) + layer + 1) / steps)
        changes.append((torch.stack(rows) - score) / abs(score))
        scores.append(score)
        hits.append(float((clean.logits.argmax(-1) == clean.targets).float().mean()))
    return Detection(
        delta_pi=torch.stack(changes).mean(0),
        pi=tuple(scores),
        accuracy=sum(hits) / len(hits),
    )


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's ρ of two tensors of the same shape; equal values share their mean rank."""
    ranks = torch.stack([_ranks(first.flatten()), _ranks(second.flatten())])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[inverse]
    return ranks


def _score(logits: Tensor, targets: Tensor) -> Tensor:
    """π of each row, float64."""
    chosen = logits.gather(1, targets[:, None])[:, 0].double()
    score: Tensor = chosen - logits.mean(1, dtype=torch.float32).double()
    return score


def _clean_run(model: PreTrainedModel, heads: AttentionHeads, task: ProxyTask, tokens: Tensor, mean: Mean) -> _CleanRun:
    *passages, copy = task.blocks(tokens)
    position = task.length - 2
    with recording(heads) as trace:
        cache = prefill(model, passages)
        if task.n > 2:
            forward(model.base_model, copy[:, :-2], cache, task.length - task.n)
        prefix = [(layer.keys, layer.values) for layer in cache.layers]
        output = forward(model, copy[:, -2:-1], cache, position)
    shape = (len(tokens), heads.num_heads, heads.head_dim)
    outputs = [each.reshape(shape) for each in trace.heads]
    if mean == "batch":
        means = [each.mean(0, keepdim=True).expand(shape) for each in outputs]
    else:
        sums = [each for each in trace.sums if isinstance(each, Tensor)]
        means = [(each / (position + 1)).to(outputs[0].dtype).view(shape) for each in sums]
    return _CleanRun(
        tokens=copy[:, -2:-1],
        position=position,
        targets=copy[:, -1],
        logits=output.logits[:, -1].float(),
        hidden=list(trace.hidden),
        heads=outputs,
        means=means,
        prefix=prefix,
        layer_outputs=trace.layer_outputs,
    )


def _replaced(
    model: PreTrainedModel, heads: AttentionHeads, clean: _CleanRun, layer: int, config: PearConfig
) -> Tensor:
    """π of every head of a layer replaced, for each sample: float64 [heads, samples], on the CPU."""
    samples = len(clean.tokens)
    row_bytes = 4 * int(clean.logits.shape[1])
    if config.later_heads == "live":
        row_bytes += 2 * sum(keys[0].nbytes + values[0].nbytes for keys, values in clean.prefix[layer:])
    rows = max(1, int(config.memory * 2**30) // row_bytes)
    scores = []
    for piece in torch.arange(heads.num_heads * samples, device=clean.tokens.device).split(rows):
        head, sample = piece // samples, piece % samples
        with _continuing(heads, clean, layer, head, sample, config.later_heads):
            cache = _cache(clean, layer, sample) if config.later_heads == "live" else None
            logits = forward(model, clean.tokens[sample], cache, clean.position).logits[:, -1]
        scores.append(_score(logits, clean.targets[sample]).cpu())
    return torch.cat(scores).view(heads.num_heads, samples)


@contextmanager
def _continuing(
    heads: AttentionHeads, clean: _CleanRun, first: int, head: Tensor, sample: Tensor, later: LaterHeads
) -> Iterator[None]:
    """Within it a pass over one token per row is the clean run from layer ``first`` on, with a head replaced in it.

    Row r is sample ``sample[r]`` without its own output of head ``head[r]``.
    """
    patched = clean.heads[first][sample]
    patched[torch.arange(len(head), device=head.device), head] = clean.means[first][sample, head]

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = clean.hidden[first][sample]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def fix(layer: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = patched if layer == first else clean.heads[layer][sample]
        return (states.reshape(args[0].shape),)

    with ExitStack() as hooks, _passed_through(heads.layers[:first], clean.layer_outputs):
        hooks.enter_context(heads.layers[first].register_forward_pre_hook(enter, with_kwargs=True))
        for layer in range(first, len(heads.layers) if later == "frozen" else first + 1):
            hooks.enter_context(heads.outputs[layer].register_forward_pre_hook(partial(fix, layer)))
        yield


def _cache(clean: _CleanRun, first: int, sample: Tensor) -> DynamicCache:
    """K and V of the tokens before, for one row per ``sample``; of layers below ``first`` only the length is read."""
    below = [
        (keys[:1].expand(len(sample), -1, -1, -1), values[:1].expand(len(sample), -1, -1, -1))
        for keys, values in clean.prefix[:first]
    ]
    return cache_of([*below, *((keys[sample], values[sample]) for keys, values in clean.prefix[first:])])


@contextmanager
def _passed_through(layers: Sequence[nn.Module], outputs: int | None) -> Iterator[None]:
    """Within it these layers hand their input on, alone or (``outputs``) as the first of a tuple.

    They stay in their places, because models choose masks by a layer's number.
    """

    def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if outputs is None else (hidden_states, *[None] * (outputs - 1))

    try:
        for layer in layers:
            # an attribute of the object shadows the class's method
            layer.forward = hand_on
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
