"""Sampling contexts: a few passages and the questions that are asked of them.

A step's contexts are a pure function of (seed, step, progress), so a resumed run sees what an uninterrupted one
would have seen, and no position in the data has to be stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from blockrag.modeling.template import PromptTemplate
from blockrag.training.attributes import attribute_questions, gap_question
from blockrag.training.data import Article, Question, ReaderData
from blockrag.training.passages import cut_passage, sentences
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


@dataclass(frozen=True)
class Mixture:
    """What contexts are made of."""

    same_kind: float = 0.6
    """Share of contexts (of those without people's questions) whose articles stand in one table."""
    people: float = 0.12
    """Share of contexts made of paragraphs that people asked about."""
    refusal: float = 0.06
    """Share of questions whose passage is left out of the context; the answer is the template's refusal."""
    gap: float = 0.15
    """Chance of a passage to have a sentence with a gap asked."""
    plain_case: float = 0.1
    """Share of questions written in lower case, half of them without the question mark."""
    is_a: float = 0.8
    """Chance of keeping a "what is ..." question, which are half of all pattern questions."""
    questions: int = 8
    """Most questions asked of a context; a question costs about 22 tokens, a passage 70 to 120."""
    opening: float = 0.12
    """Part of the training that uses small contexts: they teach copying from a passage sooner."""
    long_from: float = 0.62
    """Part of the training after which contexts have up to ten passages of up to 128 tokens. Long contexts hold half
    as many questions per token, so they come when copying is learnt."""


@dataclass(frozen=True)
class BatchShape:
    """What the contexts of one batch have in common, so that its rows are about equally long."""

    passages: int
    passage_tokens: int
    """Most tokens of a passage's block."""


def batch_shape(random: Random, progress: float, mixture: Mixture) -> BatchShape:
    """Draw the shape of a batch at ``progress`` (0 to 1) of the training."""
    if progress < mixture.opening:
        return BatchShape(random.choice((2, 3, 4)), 72)
    if progress < mixture.long_from:
        return BatchShape(random.choices((1, 2, 3, 4, 5, 6), (1, 2, 3, 10, 2, 1))[0], random.choice((72, 72, 96)))
    passages = random.choices(range(1, 11), (1, 2, 3, 14, 3, 2, 1, 1, 1, 1))[0]
    return BatchShape(passages, random.choice((72, 96, 128, 128)))


class ContextSampler:
    """Draws contexts from the training data."""

    def __init__(
        self, data: ReaderData, tokenizer: TemplateTokenizer, template: PromptTemplate, mixture: Mixture
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._template = template
        self._mixture = mixture
        self._asked = list(data.questions)
        self._urls = list(data.articles)
        self._instruction = template.instruction_ids(tokenizer)

    def sample(self, shape: BatchShape, random: Random) -> Context:
        """A context with at least one question and at most ``shape.passages`` passages."""
        while True:
            if self._data.people and random.random() < self._mixture.people:
                context = self._people_context(shape, random)
            else:
                context = self._article_context(shape, random)
            if context.branches:
                return context

    def held_out(self, shape: BatchShape, count: int, random: Random) -> list[Context]:
        """Contexts for the probe: one question each about a held-out article, distractors of the same kind."""
        contexts: list[Context] = []
        for article, questions in random.sample(self._data.held_out, len(self._data.held_out)):
            if len(contexts) == count:
                break
            question = random.choice(questions)
            text = self._cut(article, shape.passage_tokens)
            if question.answers[0] not in text:
                continue
            others = [self._data.articles[u] for u in self._neighbours(question, shape.passages - 1, random)]
            passages = [(article, text), *((other, self._cut(other, shape.passage_tokens)) for other in others)]
            random.shuffle(passages)
            contexts.append(self._context(passages, [(question.text, question.answers[0])], random, vary=False))
        return contexts

    def _article_context(self, shape: BatchShape, random: Random) -> Context:
        first = random.choice(self._asked)
        absent = 1 if random.random() < 0.5 else 0  # an article that is asked about and not shown
        wanted = shape.passages + absent
        if random.random() < self._mixture.same_kind:
            urls = [first, *(u for u in self._neighbours(self._data.questions[first][0], wanted, random) if u != first)]
        else:
            urls = [first, *random.sample(self._asked, min(wanted, len(self._asked)))]
        urls = list(dict.fromkeys(urls))[:wanted]
        random.shuffle(urls)
        shown, hidden = urls[: shape.passages], urls[shape.passages :]
        passages = [(self._data.articles[u], self._cut(self._data.articles[u], shape.passage_tokens)) for u in shown]
        asked: list[tuple[str, str]] = []
        for url, (article, text) in zip(shown, passages, strict=True):
            asked += self._answerable(self._data.questions.get(url, []), article, text, random)
        random.shuffle(asked)
        titles = {self._data.articles[u].title for u in shown}
        refused = [
            (question.text, self._template.refusal)
            for url in hidden
            for question in self._data.questions.get(url, [])
            if self._data.articles[url].title not in titles
        ]
        # Half of the contexts have a hidden article, so a question of theirs is refused twice as often.
        share = min(1.0, 2 * self._mixture.refusal * self._mixture.questions)
        if refused and random.random() < share:
            asked = [random.choice(refused), *asked]
        return self._context(passages, asked[: self._mixture.questions], random)

    def _people_context(self, shape: BatchShape, random: Random) -> Context:
        groups = random.sample(self._data.people, min(shape.passages, len(self._data.people)))
        passages: list[tuple[Article, str]] = []
        asked: list[tuple[str, str]] = []
        for article, questions in groups:
            text = self._window(article, random.choice(questions).answers[0], shape.passage_tokens)
            passages.append((article, text))
            answerable = [(q.text, q.answers[0]) for q in questions if q.answers[0] in text]
            asked += random.sample(answerable, min(3, len(answerable)))
        random.shuffle(asked)
        return self._context(passages, asked[: self._mixture.questions], random)

    def _answerable(
        self, questions: list[Question], article: Article, text: str, random: Random
    ) -> list[tuple[str, str]]:
        found = [*questions, *attribute_questions(article.title, text, random)]
        if random.random() < self._mixture.gap:
            gap = gap_question(article.title, text, random)
            found += [gap] if gap else []
        return [
            (question.text, question.answers[0])
            for question in found
            if question.answers[0] in text and (question.relation != "is_a" or random.random() < self._mixture.is_a)
        ]

    def _neighbours(self, question: Question, count: int, random: Random) -> list[str]:
        """Articles of the same kind as the one asked about, filled up with any articles."""
        kind = self._data.tables.get(question.table, [])
        urls = random.sample(kind, min(count, len(kind)))
        return urls + random.sample(self._urls, min(count - len(urls), len(self._urls)))

    def _cut(self, article: Article, max_tokens: int) -> str:
        return cut_passage(self._tokenizer, self._template, article.title, article.text, max_tokens)

    def _window(self, article: Article, answer: str, max_tokens: int) -> str:
        """The part of a paragraph that starts at most one sentence before the answer's, or at its beginning."""
        text = self._cut(article, max_tokens)
        if answer in text:
            return text
        place = next((n for n, sentence in enumerate(sentences(article.text)) if answer in sentence), 0)
        return cut_passage(
            self._tokenizer, self._template, article.title, article.text, max_tokens, first=max(0, place - 1)
        )

    def _context(
        self, passages: list[tuple[Article, str]], asked: list[tuple[str, str]], random: Random, vary: bool = True
    ) -> Context:
        blocks = [self._template.passage_ids(self._tokenizer, article.title, text) for article, text in passages]
        branches = []
        for question, answer in asked:
            if vary and random.random() < self._mixture.plain_case:
                question = question.lower().rstrip("?") if random.random() < 0.5 else question.lower()
            prompt = self._template.final_ids(self._tokenizer, question)
            branches.append(Branch(prompt, self._template.answer_ids(self._tokenizer, answer)))
        return Context([self._instruction, *blocks], branches)
