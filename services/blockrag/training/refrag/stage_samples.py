"""What the stages learn from: contexts whose passages are read in one or several compositions.

A step's samples are a pure function of (seed, step, progress), so a resumed run sees what an uninterrupted one would
have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from blockrag.modeling.bundle import Bundle
from blockrag.training.adaptation.batch import Branch, Context
from blockrag.training.adaptation.samples import DecodingTokenizer, Row, SampleLimits, SampleSource
from blockrag.training.refrag.chunk_masks import (
    Mask,
    MaskSampler,
    all_places,
    constant_mask,
    fill_budget,
    random_rate,
)
from blockrag.training.refrag.stage_config import RefragConfig
from blockrag.training.refrag.texts import PassageSource, as_target, text_start

Kind = Literal["text", "answers"]

_CURRICULUM_BASE = 3.0
"""At the start of reconstruction, a sample twice as long is this many times as rare; at its end, as frequent."""
_PIECES = 4
"""Most short samples of one passage in reconstruction."""
_MAX_PROMPT = 4096
_GROUPS = (1, 2, 3, 6)
"""How many questions share a composition; a policy sees one, but the passages are then read for few of them."""


@dataclass(frozen=True)
class View:
    """One composition of a sample's passages and what is read behind it."""

    mask: Mask
    """Of the first ``len(mask)`` passages; the others are not in the prompt."""
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class RefragSample:
    """A context in several compositions."""

    instruction: tuple[int, ...]
    """Ids of the instruction block; may be empty."""
    passages: tuple[tuple[int, ...], ...]
    views: tuple[View, ...]
    kind: Kind
    whole: bool = False
    """Read instruction and passages as one block, without block mask and compression; views then have no mask."""

    @property
    def tokens(self) -> int:
        """Tokens of the blocks and of everything that is read behind them."""
        asked = sum(len(b.prompt) + len(b.answer) for view in self.views for b in view.branches)
        return len(self.instruction) + sum(map(len, self.passages)) + asked


@dataclass
class Reconstruction:
    """A run of chunks, compressed, and the same text as the answer to an empty question."""

    source: PassageSource
    instruction: tuple[int, ...]
    prompt: Sequence[int]
    """The final block of an empty question."""
    config: RefragConfig
    k: int

    def step(self, step: int, progress: float, tokens: int) -> list[RefragSample]:
        """Samples of ``step`` with ``tokens`` tokens, about, at ``progress`` (0 to 1) of the run; so of every maker."""
        random = Random(f"{self.config.seed}/{step}")
        samples: list[RefragSample] = []
        while tokens > 0:
            for passage in self.source.draw(self.config.max_passages, random):
                chunks = self.draw_length(len(passage), progress, random)
                # cutting passages out of texts costs more than a short sample does: several are taken of each
                for _ in range(max(1, min(_PIECES, len(passage) // (2 * chunks * self.k)))):
                    samples.append(self.sample(passage, chunks, random))
                    tokens -= samples[-1].tokens
        return samples

    def draw_length(self, tokens: int, progress: float, random: Random) -> int:
        """Chunks of a sample: powers of two whose shares are a geometric sequence, rising or falling with progress."""
        lengths = [1 << n for n in range(max(1, (tokens // self.k)).bit_length())]
        ratio = _CURRICULUM_BASE ** (2 * progress - 1) if self.config.curriculum else 1.0
        return random.choices(lengths, [ratio**n for n in range(len(lengths))])[0]

    def sample(self, passage: Sequence[int], chunks: int, random: Random) -> RefragSample:
        """``chunks`` chunks of a passage's block, from one drawn at random on."""
        last = max(0, -(-len(passage) // self.k) - chunks)
        start = self.k * random.randint(0, last)
        piece = tuple(passage[start : start + self.k * chunks])
        view = View(constant_mask([piece], self.k, False), (Branch(self.prompt, list(piece)),))
        return RefragSample(self.instruction, (piece,), (view,), "text")


@dataclass
class NextPassage:
    """Passages of one text, and after several of them the next one as the target."""

    source: PassageSource
    instruction: tuple[int, ...]
    config: RefragConfig
    k: int

    def __post_init__(self) -> None:
        self._mixed = self.config.stage != "pretrain"
        self._expanded, self._full = self.config.uncompressed_shares

    def step(self, step: int, progress: float, tokens: int) -> list[RefragSample]:
        random = Random(f"{self.config.seed}/{step}")
        samples: list[RefragSample] = []
        while tokens > 0:
            samples.append(self.sample(random))
            tokens -= samples[-1].tokens
        return samples

    def sample(self, random: Random) -> RefragSample:
        """A context whose passages are targets too, each behind those before it."""
        passages = self.source.draw(random.randint(2, self.config.max_passages + 1), random, least=2)
        start = text_start(passages[0], passages[1:])
        last = len(passages) - 1
        ends = {last, *random.sample(range(1, last + 1), min(last, self.config.targets))}
        context = tuple(map(tuple, passages[:-1]))
        if self._mixed and random.random() < self._full:
            view = View((), (as_target(passages[last], start),))
            return RefragSample(self.instruction, context, (view,), "text", whole=True)
        views = [View(self._mask(passages[:end], random), (as_target(passages[end], start),)) for end in sorted(ends)]
        return RefragSample(self.instruction, context, tuple(views), "text")

    def context(self, random: Random) -> RefragSample:
        """As many passages as a context may have, compressed, and the one after them as the only target."""
        context, target = self.source.draw_target(self.config.max_passages, random)
        view = View(constant_mask(context, self.k, False), (target,))
        return RefragSample(self.instruction, context, (view,), "text")

    def _mask(self, passages: Sequence[Sequence[int]], random: Random) -> Mask:
        if not self._mixed or random.random() < self.config.compressed_share:
            return constant_mask(passages, self.k, False)
        if random.random() < self._expanded:
            return constant_mask(passages, self.k, True)
        places = all_places(passages, self.k)
        random.shuffle(places)
        return fill_budget(passages, self.k, random_rate(self.k, random), places)


@dataclass
class Questions:
    """Contexts with questions in drawn compositions, and a share of next-paragraph samples."""

    source: SampleSource
    per_step: int
    """Samples of rows that a step takes; fixed, so that the step says which they are."""
    texts: NextPassage | None
    config: RefragConfig
    k: int

    def __post_init__(self) -> None:
        expanded, self._full = self.config.uncompressed_shares
        self._masks = MaskSampler(self.k, expanded)

    def step(self, step: int, progress: float, tokens: int) -> list[RefragSample]:
        random = Random(f"{self.config.seed}/{step}")
        samples: list[RefragSample] = []
        room = int(self.config.text_share * tokens) if self.texts is not None else 0
        first = step * self.per_step
        for number in range(first, first + self.per_step):
            samples.append(self.sample(self.source.sample(number), random))
        while room > 0 and self.texts is not None:
            samples.append(self.texts.sample(random))
            room -= samples[-1].tokens
        return samples

    def sample(self, context: Context, random: Random) -> RefragSample:
        """A context in compositions that are drawn for a few of its questions at a time."""
        instruction, passages = context.instruction, context.passages
        if not passages or random.random() < self._full:
            view = View((), context.branches)
            return RefragSample(instruction, passages, (view,), "answers", whole=True)
        branches = list(context.branches)
        random.shuffle(branches)
        views = []
        while branches:
            size = random.choice(_GROUPS)
            group, branches = branches[:size], branches[size:]
            views.append(View(self._masks.draw(passages, group, random), tuple(group)))
        return RefragSample(instruction, passages, tuple(views), "answers")


def row_source(
    rows: Sequence[Row],
    bundle: Bundle,
    tokenizer: DecodingTokenizer,
    max_passages: int,
    refusal_share: float,
    seed: int | str,
) -> SampleSource:
    """Samples of question rows as ``adapt block`` makes them, for what a bundle's passages and positions hold."""
    limits = SampleLimits(
        min_passages=1,
        max_passages=max_passages,
        passage_tokens=bundle.passage_tokens,
        max_tokens=min(_MAX_PROMPT, bundle.max_context_tokens),
        refusal_share=refusal_share,
    )
    return SampleSource(rows, tokenizer, bundle.template, limits, seed)
