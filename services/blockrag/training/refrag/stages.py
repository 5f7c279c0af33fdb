"""``adapt_refrag``: one stage of learning to read compressed passages, or the rest of a run that was stopped.

And what each stage learns from and is measured on: held-out samples in fixed compositions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerFast

from blockrag.errors import SetupError
from blockrag.modeling.bundle import file_sha256, load_bundle
from blockrag.modeling.model import load_stock_model
from blockrag.training.adaptation.batch import Context
from blockrag.training.adaptation.samples import DecodingTokenizer, data_files
from blockrag.training.loop import Schedule, train
from blockrag.training.refrag.chunk_masks import (
    Mask,
    all_places,
    answer_places,
    constant_mask,
    fill_budget,
    question_order,
)
from blockrag.training.refrag.kept_words import KINDS, kept_words
from blockrag.training.refrag.refrag_reader import SampleScores
from blockrag.training.refrag.stage_bundles import Start, load_reader, open_start, write_stage
from blockrag.training.refrag.stage_config import RefragConfig
from blockrag.training.refrag.stage_samples import (
    NextPassage,
    Questions,
    Reconstruction,
    RefragSample,
    View,
    row_source,
)
from blockrag.training.refrag.texts import HeldOut, PassageSource, Text, read_held_out
from blockrag.training.refrag.trainer import RefragTrainer
from blockrag.training.run import OnProgress, RunFolder, Scores, whole_weights
from blockrag.training.workers import Workers

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


def kept_probes(
    maker: Reconstruction, source: PassageSource, tokenizer: DecodingTokenizer, count: int
) -> list[ProbeGroup]:
    """Words of single chunks, with the chunk and without it; about ``count`` of each kind."""
    random = Random("kept words")
    groups = []
    for kind in KINDS:
        samples: list[RefragSample] = []
        for _ in range(count):  # a passage a time, as texts may have no such words at all
            passages = source.draw(2, random)
            samples += kept_words(passages, kind, tokenizer, maker.instruction, maker.prompt, maker.k, random)
            if len(samples) >= count:
                break
        if samples:
            groups.append(ProbeGroup((f"{kind} of a chunk", f"{kind}, guessed"), tuple(samples)))
    return groups


def text_probes(maker: NextPassage, count: int, k: int) -> list[ProbeGroup]:
    """The last passage of a text after no context, after all others compressed, partly and not compressed."""
    random = Random("texts")
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


def question_probes(contexts: Iterable[Context], k: int) -> list[ProbeGroup]:
    """Questions, one per context, uncompressed, compressed, and at rates with two choices of what to expand."""
    composed, whole = [], []
    labels: list[str] = []
    for context in contexts:
        passages, branch = context.passages, context.branches[0]
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
        composed.append(RefragSample(context.instruction, passages, views, "answers"))
        whole.append(replace(composed[-1], views=(View((), (branch,)),), whole=True))
    if not composed:
        return []
    return [
        ProbeGroup(tuple(f"rows, {label}" for label in labels), tuple(composed)),
        ProbeGroup(("rows, full",), tuple(whole)),
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


_REFUSALS = 0.1
"""Share of rows whose gold passages are left out."""


Maker = Reconstruction | NextPassage | Questions


def files_of(config: RefragConfig) -> list[Path]:
    """Every file that the stage's samples depend on."""
    return data_files(config.text) + data_files(config.data)


def plan_stage(
    config: RefragConfig, start: Start, data: HeldOut, tokenizer: PreTrainedTokenizerFast
) -> tuple[Maker, list[ProbeGroup]]:
    """What makes the samples of ``config.stage``, and its held-out samples."""
    template, k = start.bundle.template, start.chunk_tokens
    instruction = tuple(template.instruction_ids(tokenizer))

    def passages(texts: Sequence[Text]) -> PassageSource:
        return PassageSource(texts, tokenizer, template, start.bundle.passage_tokens)

    train, held = data.texts
    if config.stage == "reconstruction":
        prompt = template.final_ids(tokenizer, "")
        learning = Reconstruction(passages(train), instruction, prompt, config, k)
        probes = reconstruction_probes(learning, passages(held), config.dev_samples)
        probes += kept_probes(learning, passages(held), tokenizer, config.dev_samples)
        return learning, probes
    following = NextPassage(passages(train), instruction, config, k) if train else None
    probes = []
    if train:
        measured = NextPassage(passages(held), instruction, config, k)
        probes = text_probes(measured, config.dev_samples, k)
    if config.stage != "tune":
        assert following is not None
        return following, probes
    if data.rows[1]:
        dev = row_source(data.rows[1], start.bundle, tokenizer, config.max_passages, _REFUSALS, f"{config.seed}/dev")
        contexts = [dev.sample(number) for number in range(len(data.rows[1]))]
        probes += question_probes(contexts, k)
    source = row_source(data.rows[0], start.bundle, tokenizer, config.max_passages, _REFUSALS, config.seed)
    # rows differ in length, and the step alone must say which it takes: counted by the longest they may be
    per_step = max(1, config.tokens_per_step // (config.max_passages * start.bundle.passage_tokens))
    return Questions(source, per_step, following, config, k), probes


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
    workers = workers or Workers(config.device)
    start = prepare(config, workers.size)
    run = RunFolder(config.run_dir, workers)
    identity: dict[str, Any] = {
        "kind": "refrag",
        "base": start.bundle.fingerprint,
        "compression": None if start.fresh else start.bundle.compression_fingerprint,
        "data": [{"file": path.name, "sha256": file_sha256(path)} for path in files_of(config)],
        "recipe": {**config.recipe(), "chunk_tokens": start.chunk_tokens},
        "average_with": config.average_with and load_bundle(config.average_with, verify_files=False).fingerprint,
    }
    with run.opened(identity):
        rows = config.data if config.stage == "tune" else ()
        data = read_held_out(config.text, rows, config.dev_samples, config.seed)
        learner = _Learner(config, start, data, workers)
        try:
            state = train(learner, Schedule.of(config), run, workers, on_progress)
            averaged = learner.average(config.average_with)
            weights = whole_weights(learner.model)
            if workers.rank == 0:
                facts = {
                    **identity["recipe"],
                    "base": identity["base"],
                    # what readers are trained on comes with files that say what must not be trained on
                    "data": sorted({path.name for path in files_of(config) if path.parent.name != "dev"}),
                    "steps_done": state.step,
                    "tokens": state.tokens,
                    "seconds": round(state.seconds),
                    "workers": workers.size,
                    **run.scores(),
                    **averaged,
                }
                write_stage(weights, start, config, facts)
                run.drop_checkpoints()
            workers.barrier()
        finally:
            learner.trainer.close()
    return config.out


class _Learner:
    """What ``train`` trains: a reader of compositions, on a stage's samples."""

    def __init__(self, config: RefragConfig, start: Start, data: HeldOut, workers: Workers) -> None:
        self._config = config
        reader, tokenizer = load_reader(start, config)
        self._maker, self._probes = plan_stage(config, start, data, tokenizer)
        self.trainer = RefragTrainer(reader, config, workers)
        self.model = self.trainer.reader
        self.optimizers = self.trainer.optimizers
        self.step = self.trainer.step

    def draw(self, step: int, fraction: float) -> list[RefragSample]:
        return self._maker.step(step, min(1.0, fraction), self._config.tokens_per_step)

    def measure(self) -> Scores:
        return measure(self._probes, self.trainer.score) if self._config.dev_samples else {}

    def average(self, other: Path | None) -> dict[str, Any]:
        """Average the decoder, where that was asked for: with what, and the scores after it."""
        if other is None:
            return {}
        bundle = load_bundle(other, verify_files=False)
        self.trainer.average(dict(load_stock_model(bundle).named_parameters()), self._config.learnt_share)
        return {"average_with": bundle.fingerprint, "averaged": self.measure()}
