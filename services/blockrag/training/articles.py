"""Contexts of article intros of the same kind, with the questions that patterns found in them."""

from __future__ import annotations

from random import Random

from blockrag.training.attributes import attribute_questions
from blockrag.training.data import Article, Question, ReaderData
from blockrag.training.drafts import BatchShape, Cutter, Draft
from blockrag.training.mixture import Mixture
from blockrag.training.paraphrases import paraphrase
from blockrag.training.rewording import SentenceAsker


class ArticleSource:
    """Intros with pattern, attribute and cloze questions, and questions about an intro that is not shown."""

    def __init__(self, data: ReaderData, cutter: Cutter, mixture: Mixture, asker: SentenceAsker) -> None:
        self._data = data
        self._cutter = cutter
        self._mixture = mixture
        self._asker = asker
        self._asked = list(data.questions)
        self._urls = list(data.articles)

    def draft(self, shape: BatchShape, random: Random) -> Draft:
        first = random.choice(self._asked)
        absent = 1 if random.random() < 0.5 else 0  # an article that is asked about and not shown
        wanted = shape.passages + absent
        if random.random() < self._mixture.same_kind:
            urls = [first, *(u for u in self.neighbours(self._data.questions[first][0], wanted, random) if u != first)]
        else:
            urls = [first, *random.sample(self._asked, min(wanted, len(self._asked)))]
        urls = list(dict.fromkeys(urls))[:wanted]
        random.shuffle(urls)
        shown, hidden = urls[: shape.passages], urls[shape.passages :]
        draft = Draft()
        for url in shown:
            article = self._data.articles[url]
            passage = Article(article.title, self._cutter.cut(article, shape.passage_tokens))
            draft.passages.append(passage)
            draft.asked += self._answerable(self._data.questions.get(url, []), passage, random)
        random.shuffle(draft.asked)
        titles = {passage.title for passage in draft.passages}
        refused = [
            paraphrase(question, self._data.articles[url].title, random) if self._reworded(random) else question
            for url in hidden
            for question in self._data.questions.get(url, [])
            if self._data.articles[url].title not in titles
        ]
        # Half of the contexts have a hidden article, so a question of theirs is refused twice as often.
        if refused and random.random() < min(1.0, 2 * self._mixture.refusal * shape.questions):
            draft.asked.insert(0, (random.choice(refused).text, None))
        return draft

    def probe(self, shape: BatchShape, count: int, random: Random) -> list[Draft]:
        """Drafts with one question each about a held-out article, among articles of the same kind."""
        drafts: list[Draft] = []
        for article, questions in random.sample(self._data.held_out, len(self._data.held_out)):
            if len(drafts) == count:
                break
            question = random.choice(questions)
            passage = Article(article.title, self._cutter.cut(article, shape.passage_tokens))
            if question.answers[0] not in passage.text:
                continue
            others = [self._data.articles[u] for u in self.neighbours(question, shape.passages - 1, random)]
            passages = [passage, *(Article(o.title, self._cutter.cut(o, shape.passage_tokens)) for o in others)]
            random.shuffle(passages)
            drafts.append(Draft(passages, [(question.text, question.answers[0])]))
        return drafts

    def neighbours(self, question: Question, count: int, random: Random) -> list[str]:
        """Urls of articles of the same kind as the one asked about, filled up with any articles."""
        kind = self._data.tables.get(question.table, [])
        urls = random.sample(kind, min(count, len(kind)))
        return urls + random.sample(self._urls, min(count - len(urls), len(self._urls)))

    def _answerable(self, questions: list[Question], passage: Article, random: Random) -> list[tuple[str, str | None]]:
        found = [
            paraphrase(question, passage.title, random) if self._reworded(random) else question
            for question in questions
            if question.relation != "is_a" or random.random() < self._mixture.is_a
        ]
        found += attribute_questions(passage.title, passage.text, random)
        found += self._asker.questions(passage.title, passage.text, random)
        return [(question.text, question.answers[0]) for question in found if question.answers[0] in passage.text]

    def _reworded(self, random: Random) -> bool:
        return random.random() < self._mixture.paraphrase
