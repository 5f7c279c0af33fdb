"""Sampling contexts: a few passages and the questions that are asked of them.

A step's contexts are a pure function of (seed, step, progress), so a resumed run sees what an uninterrupted one
would have seen, and no position in the data has to be stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from blockrag.modeling.template import PromptTemplate
from blockrag.training.articles import ArticleSource
from blockrag.training.data import ReaderData
from blockrag.training.drafts import BatchShape, Cutter, Draft, Source
from blockrag.training.mixture import Mixture
from blockrag.training.people import PeopleSource
from blockrag.training.rewording import RelatedWords, SentenceAsker
from blockrag.training.sheets import SheetSource
from blockrag.training.texts import TextSource
from blockrag.training.tokenizer import TemplateTokenizer


@dataclass(frozen=True)
class Branch:
    """One question of a context with its answer: a last block."""

    prompt: list[int]
    """Ids up to the token after which the answer starts."""
    answer: list[int]
    """Ids of the answer and of the token that ends it: the target."""


@dataclass(frozen=True)
class Context:
    """What one row of a batch holds."""

    blocks: list[list[int]]
    """The instruction block and one block per passage."""
    branches: list[Branch]
    gaps: tuple[int, ...] = ()
    """Positions left empty before each block and before the questions; empty where everything is contiguous."""


class ContextSampler:
    """Draws contexts from the training data."""

    def __init__(
        self,
        data: ReaderData,
        tokenizer: TemplateTokenizer,
        template: PromptTemplate,
        mixture: Mixture,
        related_words: RelatedWords = MappingProxyType({}),
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._mixture = mixture
        self._instruction = template.instruction_ids(tokenizer)
        cutter = Cutter(tokenizer, template)
        asker = SentenceAsker(mixture, related_words)
        self._articles = ArticleSource(data, cutter, mixture, asker)
        self._people = PeopleSource(data, cutter, mixture)
        texts = TextSource(data, cutter, mixture, asker)
        # A source without data is left out, and its share goes to the others.
        shares: list[tuple[Source, float]] = [
            (self._articles, mixture.articles),
            (SheetSource(data, cutter, mixture), mixture.sheets),
            *([(self._people, mixture.people)] if self._people else []),
            *([(texts, mixture.texts)] if texts else []),
        ]
        self._sources = [source for source, _ in shares]
        self._shares = [share for _, share in shares]

    def sample(self, shape: BatchShape, random: Random) -> Context:
        """A context with at least one question and at most ``shape.passages`` passages."""
        while True:
            draft = random.choices(self._sources, self._shares)[0].draft(shape, random)
            if draft.asked:
                return self._context(draft, shape, random)

    def probes(self, shape: BatchShape, count: int, random: Random) -> dict[str, list[Context]]:
        """Held-out contexts with one question each, by name of the source."""
        drafts = {"articles": self._articles.probe(shape, count, random)}
        if self._people:
            drafts["people"] = self._people.probe(shape, count, random)
        return {name: [self._context(d, shape, random, vary=False) for d in found] for name, found in drafts.items()}

    def _context(self, draft: Draft, shape: BatchShape, random: Random, vary: bool = True) -> Context:
        blocks = [self._template.passage_ids(self._tokenizer, p.title, p.text) for p in draft.passages]
        branches = []
        for question, answer in draft.asked[: shape.questions]:
            if vary and random.random() < self._mixture.plain_case:
                question = question.lower().rstrip("?") if random.random() < 0.5 else question.lower()
            prompt = self._template.final_ids(self._tokenizer, question)
            target = self._template.refusal if answer is None else answer
            branches.append(Branch(prompt, self._template.answer_ids(self._tokenizer, target)))
        blocks = [self._instruction, *blocks]
        gaps: tuple[int, ...] = ()
        room = self._mixture.spread_tokens - sum(map(len, blocks))
        if vary and room > 0 and random.random() < self._mixture.spread:
            total = random.randint(0, room)
            cuts = sorted(random.randint(0, total) for _ in blocks)
            gaps = (0, *(b - a for a, b in zip([0, *cuts], cuts, strict=False)))
        return Context(blocks, branches, gaps)
