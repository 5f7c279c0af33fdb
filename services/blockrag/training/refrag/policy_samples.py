"""Prompts that a policy learns from: contexts with questions, and texts with their next paragraph.

A step's prompts are a pure function of (seed, step).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from blockrag.budget import chunk_count
from blockrag.modeling.bundle import Bundle, file_sha256
from blockrag.modeling.refrag.policy_features import policy_ranks
from blockrag.training.adaptation.batch import Branch, Context
from blockrag.training.adaptation.samples import Row, SampleSource, data_files
from blockrag.training.refrag.chunk_masks import answer_places, passage_ranking
from blockrag.training.refrag.stage_config import PolicyTrainingConfig
from blockrag.training.refrag.stage_samples import Kind, row_source
from blockrag.training.refrag.texts import PassageSource, Text, read_held_out

_ANSWER_SHARE = 0.7
_RANK_NOISE = 0.15
"""Share of passages that a question's ranking puts elsewhere: retrieval is not always right, nor always wrong."""


@dataclass(frozen=True)
class PolicyContext(Context):
    """Passages, and what is asked of them."""

    ranks: tuple[tuple[int, ...], ...]
    """For each branch, the place that retrieval gave each passage."""
    kind: Kind


def answer_target(context: PolicyContext, branch: Branch, chunk_tokens: int) -> NDArray[np.float32] | None:
    """What a choice that knows the answer would draw first: a distribution over all chunks, [chunks].

    Most on the chunks that hold the answer, the rest on those of its passage, the nearer the more. None where the
    answer stands in no passage as it is.
    """
    places = answer_places(context.passages, branch, chunk_tokens)
    if not places:
        return None
    gold = places[0][0]
    counts = [chunk_count(len(passage), chunk_tokens) for passage in context.passages]
    distance = np.abs(np.arange(counts[gold])[:, None] - np.array([chunk for _, chunk in places])).min(axis=1)
    part = (1.0 / (1.0 + distance) ** 2).astype(np.float32)
    held = distance == 0
    part[held] = _ANSWER_SHARE / held.sum()
    if not held.all():
        part[~held] *= (1 - _ANSWER_SHARE) / part[~held].sum()
    target = np.zeros(sum(counts), dtype=np.float32)
    first = sum(counts[:gold])
    target[first : first + len(part)] = part
    normalised: NDArray[np.float32] = target / target.sum()
    return normalised


@dataclass
class PolicySamples:
    """Draws the contexts of a step."""

    rows: SampleSource | None
    texts: PassageSource | None
    instruction: tuple[int, ...]
    text_share: float
    """Of the contexts; all where there are no questions, none where there are no texts."""
    max_passages: int
    ranked: bool
    """Whether passages of a question come with places that a retrieval could have given them; otherwise, as for texts,
    those nearest to the target count as the best."""
    seed: int

    def __post_init__(self) -> None:
        self._text_share = 0.0 if self.texts is None else self.text_share if self.rows is not None else 1.0

    def questions(self, step: int, contexts: int) -> list[PolicyContext]:
        """Contexts with questions alone, for a step of imitation; a context may have none and is then left out."""
        random = Random(f"{self.seed}/imitation/{step}")
        drawn = [self.asked(step * contexts + number, random) for number in range(contexts)]
        return [context for context in drawn if context is not None]

    def step(self, step: int, contexts: int) -> list[PolicyContext]:
        """The contexts of a step."""
        random = Random(f"{self.seed}/{step}")
        found: list[PolicyContext] = []
        while len(found) < contexts:
            number = step * contexts + len(found)
            context = self.text(random) if random.random() < self._text_share else self.asked(number, random)
            if context is not None:
                found.append(context)
        return found

    def asked(self, number: int, random: Random) -> PolicyContext | None:
        """Sample ``number`` of the question rows; None where it has no passage."""
        assert self.rows is not None
        context = self.rows.sample(number)
        passages = context.passages
        if not passages:
            return None
        ranks = tuple(
            policy_ranks(self.ranked, _ranks(passages, branch, random) if self.ranked else range(len(passages)))
            for branch in context.branches
        )
        return PolicyContext(context.instruction, passages, context.branches, ranks, "answers")

    def text(self, random: Random) -> PolicyContext:
        """Passages of one text, and the next one as the target."""
        assert self.texts is not None
        passages, branch = self.texts.draw_target(random.randint(1, self.max_passages), random)
        ranks = policy_ranks(False, range(len(passages)))
        return PolicyContext(self.instruction, passages, (branch,), (ranks,), "text")


def _ranks(passages: Sequence[Sequence[int]], branch: Branch, random: Random) -> tuple[int, ...]:
    """Places of the passages in a ranking for the question, with some passages put anywhere."""
    order = passage_ranking(passages, branch.prompt)
    moved = [number for number in order if random.random() < _RANK_NOISE]
    kept = [number for number in order if number not in moved]
    for number in moved:
        kept.insert(random.randint(0, len(kept)), number)
    ranks = [0] * len(kept)
    for rank, number in enumerate(kept):
        ranks[number] = rank
    return tuple(ranks)


@dataclass(frozen=True)
class PolicyData:
    """What a run learns from and is measured on."""

    samples: PolicySamples
    probes: Sequence[PolicyContext]
    """Held out, one target each."""
    digests: Mapping[str, str]
    """Of every file, by name."""


def load_policy_data(config: PolicyTrainingConfig, bundle: Bundle) -> PolicyData:
    """Read what ``config`` names. Raises SetupError naming the file and the problem."""
    tokenizer = bundle.load_tokenizer()
    data = read_held_out(config.text, config.data, config.dev_samples, config.seed)

    def samples(texts: Sequence[Text], rows: Sequence[Row], seed: int | str) -> PolicySamples:
        return PolicySamples(
            # a refusal's likelihood says nothing of which chunks matter
            rows=row_source(rows, bundle, tokenizer, config.max_passages, 0.0, seed) if rows else None,
            texts=PassageSource(texts, tokenizer, bundle.template, bundle.passage_tokens) if texts else None,
            instruction=tuple(bundle.template.instruction_ids(tokenizer)),
            text_share=config.chosen_text_share,
            max_passages=config.max_passages,
            ranked=config.query,
            seed=config.seed,
        )

    held = samples(data.texts[1], data.rows[1], f"{config.seed}/dev")
    random = Random(f"{config.seed}/probes")
    probes = [held.asked(number, random) for number in range(len(data.rows[1]))]
    if data.texts[1] and config.chosen_text_share > 0:
        probes += [held.text(random) for _ in range(config.dev_samples)]
    return PolicyData(
        samples=samples(data.texts[0], data.rows[0], config.seed),
        probes=[probe for probe in probes if probe is not None],
        digests=_digests(config),
    )


def _digests(config: PolicyTrainingConfig) -> dict[str, str]:
    files = [*data_files(config.text), *data_files(config.data)]
    named = {f"{path.parent.name}/{path.name}": file_sha256(path) for path in files}
    if len(named) == len(files):
        return named
    everything = hashlib.sha256("".join(sorted(file_sha256(path) for path in files)).encode())
    return {"all files": everything.hexdigest()}
