"""Contexts of neighbouring passages of one long text, asked about spans that stand in more than one sentence.

A sentence with a span that recurs elsewhere is taken out of its passage and asked with the span left out, so the
answer has to be found from what other sentences say (recurring span selection, arXiv 2101.00438, section 3). All
passages have the same title, as passages of one document have when they are served.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from blockrag.training.cloze import NAME, NUMBER, answer_spans, cloze_question
from blockrag.training.data import LONG_TEXTS, Article, Document, ReaderData
from blockrag.training.drafts import BatchShape, Cutter, Draft
from blockrag.training.mixture import Mixture
from blockrag.training.passages import sentences
from blockrag.training.rewording import SentenceAsker


class TextSource:
    """Consecutive passages of pages, textbooks and books."""

    def __init__(self, data: ReaderData, cutter: Cutter, mixture: Mixture, asker: SentenceAsker) -> None:
        self._documents = data.documents
        self._names = list(data.documents)
        self._weights = [LONG_TEXTS[name] for name in self._names]
        self._cutter = cutter
        self._asker = asker

    def __bool__(self) -> bool:
        return bool(self._names)

    def draft(self, shape: BatchShape, random: Random) -> Draft:
        name = random.choices(self._names, self._weights)[0]
        document = random.choice(self._documents[name])
        pieces = self._pieces(document, shape, random)
        recurring = self._recurring(pieces, document.title, shape.questions // 4, random)
        texts = [" ".join(piece) for piece in pieces if piece]
        asked: list[tuple[str, str | None]] = []
        asked += [(question, answer) for question, answer in recurring if any(answer in text for text in texts)]
        for text in texts:
            asked += [(q.text, q.answers[0]) for q in self._asker.questions(document.title, text, random)]
        random.shuffle(asked)
        random.shuffle(texts)
        return Draft([Article(document.title, text) for text in texts], asked)

    def _pieces(self, document: Document, shape: BatchShape, random: Random) -> list[list[str]]:
        """Sentences of neighbouring passages, from a paragraph drawn at random on."""
        room = self._cutter.room(document.title, shape.passage_tokens)
        start = random.randrange(len(document.paragraphs))
        pieces: list[list[str]] = []
        left = 0
        for paragraph in document.paragraphs[start : start + 6 * shape.passages]:
            for sentence in sentences(paragraph):
                tokens = self._cutter.count(sentence)
                if tokens > room:
                    continue
                if tokens > left:
                    if len(pieces) == shape.passages:
                        return pieces
                    pieces.append([])
                    left = room
                pieces[-1].append(sentence)
                left -= tokens
        return pieces

    def _recurring(self, pieces: list[list[str]], title: str, count: int, random: Random) -> list[tuple[str, str]]:
        """Questions made of sentences that are taken out of ``pieces``."""
        seen: Counter[str] = Counter()
        for piece in pieces:
            for sentence in piece:
                seen.update({m[0] for pattern in (NAME, NUMBER) for m in pattern.finditer(sentence)})
        recurring = {span for span, times in seen.items() if 2 <= times <= 4 and len(span) > 2 and span not in title}
        asked: list[tuple[str, str]] = []
        for piece in random.sample(pieces, len(pieces)):
            if len(asked) == count:
                break
            fitting = [s for s in piece if len(s.split()) >= 6 and any(span in s for span in recurring)]
            if len(piece) < 2 or not fitting:
                continue
            sentence = random.choice(fitting)
            spans = [m for m in answer_spans(sentence) if m[0] in recurring and sentence.count(m[0]) == 1]
            if spans:
                span = random.choice(spans)
                asked.append((cloze_question(sentence, span, title, random, around=14).text, span[0]))
                piece.remove(sentence)
                recurring.discard(span[0])
        return asked
