"""Contexts of paragraphs that people asked about."""

from __future__ import annotations

from random import Random

from blockrag.training.data import PEOPLE_QUESTIONS, Article, Paragraph, ReaderData
from blockrag.training.drafts import BatchShape, Cutter, Draft
from blockrag.training.mixture import Mixture


class PeopleSource:
    """Paragraphs of one source, some of them of one family (a story, an article, a site), with people's questions."""

    def __init__(self, data: ReaderData, cutter: Cutter, mixture: Mixture) -> None:
        self._cutter = cutter
        self._mixture = mixture
        self._sources = {name: found for name, found in data.people.items() if any(p.questions for p in found)}
        self._names = list(self._sources)
        self._weights = [PEOPLE_QUESTIONS[name] for name in self._names]
        self._asked = {name: [p for p in found if p.questions] for name, found in self._sources.items()}
        self._families: dict[tuple[str, str], list[Paragraph]] = {}
        for name, found in self._sources.items():
            for paragraph in found:
                self._families.setdefault((name, paragraph.family), []).append(paragraph)
        self._held_out = data.held_out_people

    def __bool__(self) -> bool:
        return bool(self._names)

    def draft(self, shape: BatchShape, random: Random) -> Draft:
        name = random.choices(self._names, self._weights)[0]
        shown = self._paragraphs(name, shape.passages + 1, random)
        hidden = shown.pop() if len(shown) > shape.passages else None
        random.shuffle(shown)
        draft = Draft()
        for paragraph in shown:
            about = random.choice(paragraph.questions).answers[0] if paragraph.questions else ""
            text = self._cutter.window(paragraph.article, about, shape.passage_tokens)
            draft.passages.append(Article(paragraph.article.title, text))
            answerable = [(q.text, q.answers[0]) for q in paragraph.questions if q.answers[0] in text]
            draft.asked += random.sample(answerable, min(4, len(answerable)))
        random.shuffle(draft.asked)
        if hidden and hidden.questions and random.random() < self._mixture.people_refusal * shape.questions:
            question = random.choice(hidden.questions)
            if not any(question.answers[0] in passage.text for passage in draft.passages):
                draft.asked.insert(0, (question.text, None))
        return draft

    def probe(self, shape: BatchShape, count: int, random: Random) -> list[Draft]:
        """Drafts with one question each about a held-out paragraph."""
        drafts: list[Draft] = []
        for paragraph in random.sample(self._held_out, min(count, len(self._held_out))):
            question = random.choice(paragraph.questions)
            text = self._cutter.window(paragraph.article, question.answers[0], shape.passage_tokens)
            if question.answers[0] not in text:
                continue
            name = random.choices(self._names, self._weights)[0]
            others = self._paragraphs(name, shape.passages - 1, random)
            cut = [Article(p.article.title, self._cutter.cut(p.article, shape.passage_tokens)) for p in others]
            passages = [Article(paragraph.article.title, text), *cut]
            random.shuffle(passages)
            drafts.append(Draft(passages, [(question.text, question.answers[0])]))
        return drafts

    def _paragraphs(self, name: str, count: int, random: Random) -> list[Paragraph]:
        """A paragraph with questions, up to half of the rest from its family, the others from the same source."""
        first = random.choice(self._asked[name])
        family = self._families[name, first.family]
        close = random.sample(family, min(len(family), random.randint(0, max(1, count // 2))))
        asked = self._asked[name]
        rest = random.sample(asked, min(count, len(asked)))
        return list({id(p): p for p in (first, *close, *rest)}.values())[:count]
