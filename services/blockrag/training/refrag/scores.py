"""What a run is measured on: held-out samples in fixed compositions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from blockrag.training.refrag.contexts import Context
from blockrag.training.refrag.masks import (
    Mask,
    all_places,
    answer_places,
    constant_mask,
    fill_budget,
    question_order,
)
from blockrag.training.refrag.reader import SampleScores
from blockrag.training.refrag.samples import NextPassage, Reconstruction, RefragSample, View, split_instruction
from blockrag.training.refrag.texts import PassageSource

QUESTION_RATES = (2.0, 4.0)


@dataclass(frozen=True)
class ProbeGroup:
    """Samples that are measured alike: each has one view per label, with one target each."""

    labels: tuple[str, ...]
    samples: tuple[RefragSample, ...]


def reconstruction_probes(maker: Reconstruction, source: PassageSource, count: int) -> list[ProbeGroup]:
    """Runs of 1, 4 and 16 chunks, or of a whole passage where it has fewer; ``count`` each."""
    random = Random("reconstruction")
    groups = []
    for chunks in (1, 4, 16):
        passages: list[list[int]] = []
        while len(passages) < count:
            passages += source.draw(2, random)
        samples = tuple(maker.sample(passage, chunks, random) for passage in passages[:count])
        groups.append(ProbeGroup((f"{chunks} chunks",), samples))
    return groups


def text_probes(maker: NextPassage, count: int, k: int, seed: str = "texts") -> list[ProbeGroup]:
    """The last passage of a text after no context, after all others compressed, partly and not compressed."""
    random = Random(seed)
    rate = k / 2
    composed, whole = [], []
    for _ in range(count):
        sample = maker.context(random)
        target = sample.views[-1].branches
        places = all_places(sample.passages, k)
        random.shuffle(places)
        masks = (
            (),
            constant_mask(sample.passages, k, False),
            fill_budget(sample.passages, k, rate, places),
            constant_mask(sample.passages, k, True),
        )
        composed.append(replace(sample, views=tuple(View(mask, target) for mask in masks)))
        whole.append(replace(sample, views=(View((), target),), whole=True))
    labels = ("no context", "compressed", f"rate {rate:g}, random", "block")
    return [
        ProbeGroup(tuple(f"text, {label}" for label in labels), tuple(composed)),
        ProbeGroup(("text, full",), tuple(whole)),
    ]


def question_probes(
    contexts: Iterable[Context], instruction: Sequence[int], k: int, name: str = "questions"
) -> list[ProbeGroup]:
    """Questions, one per context, uncompressed, compressed, and at rates with two choices of what to expand."""
    composed, whole = [], []
    labels: list[str] = []
    for context in contexts:
        opening, passages = split_instruction(context, instruction)
        branch = context.branches[0]
        order = question_order(passages, branch, k)
        answer = answer_places(passages, branch, k)
        masks: dict[str, Mask] = {
            "block": constant_mask(passages, k, True),
            "compressed": constant_mask(passages, k, False),
        }
        for rate in QUESTION_RATES:
            masks[f"rate {rate:g}, like the question"] = fill_budget(passages, k, rate, order)
        masks["only the answer's chunks"] = fill_budget(passages, k, 1.0, answer)
        labels = list(masks)
        views = tuple(View(mask, (branch,)) for mask in masks.values())
        composed.append(RefragSample(opening, passages, views, "answers"))
        whole.append(RefragSample(opening, passages, (View((), (branch,)),), "answers", whole=True))
    if not composed:
        return []
    return [
        ProbeGroup(tuple(f"{name}, {label}" for label in labels), tuple(composed)),
        ProbeGroup((f"{name}, full",), tuple(whole)),
    ]


def measure(
    groups: Sequence[ProbeGroup], score: Callable[[Sequence[RefragSample]], SampleScores]
) -> dict[str, dict[str, float]]:
    """By label: nats per target token, share of tokens that are right, share of targets that are right as a whole.

    Texts get ``recovered`` too, where the uncompressed context gains anything over none: the share of it gained.
    """
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        scores = score(group.samples)
        views = len(group.labels)
        for number, label in enumerate(group.labels):
            tokens = scores.tokens[number::views]
            right = scores.right[number::views]
            found[label] = {
                "nats": float(scores.losses[number::views].sum() / tokens.sum()),
                "tokens_right": float(right.sum() / tokens.sum()),
                "exact": float((right == tokens).float().mean()),
            }
    none, block = found.get("text, no context"), found.get("text, block")
    if none is not None and block is not None:
        gap = none["nats"] - block["nats"]
        for label, values in found.items():
            if label.startswith("text, ") and gap > 0:
                values["recovered"] = (none["nats"] - values["nats"]) / gap
    return found
