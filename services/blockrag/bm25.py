"""BM25 weights of passages and queries, made by Qdrant's own model for both engines (the engines add the IDF)."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import qdrant_edge as qdrant
from numpy.typing import NDArray

from blockrag.languages import DEFAULT_LANGUAGE, STEMMED

_MEAN_TERMS = 48.0
"""Mean terms of a passage without stop words; BM25's length normalisation. Measured for passages of 128 tokens."""

# Scripts whose words no space ends, and Hangul, whose particles are written onto the word.
_UNSPACED = re.compile(
    "["
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"  # Thai, Lao
    "\u1000-\u103f\u1050-\u108f\u1780-\u17d3"  # Burmese, Khmer
    "\u3005-\u3007\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\uac00-\ud7a3"  # Hangul
    "]+"
)


_AS_WRITTEN = {"stemmer": qdrant.DisabledStemmer(), "stopwords": qdrant.StopwordsSet(custom=set())}


@dataclass(frozen=True)
class SparseVector:
    """BM25 weights of terms; ``indices`` are hashes of the terms."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


class Bm25:
    """Words of one language: stems without stop words, where the language is one of ``STEMMED``; accents are folded.

    Text whose words no space ends (Chinese, Japanese, Thai, Lao, Burmese, Khmer), and Korean, is cut into all its
    pairs of neighbouring characters, in every language. Safe to share between threads.
    """

    def __init__(self, language: str = DEFAULT_LANGUAGE) -> None:
        options: dict[str, Any] = {"language": language} if language in STEMMED else _AS_WRITTEN
        self._model = qdrant.Bm25(qdrant.Bm25Config(avg_len=_MEAN_TERMS, ascii_folding=True, **options))

    def embed_passage(self, title: str, text: str) -> SparseVector:
        """Weights of a passage; its title counts as text."""
        return _vector(self._model.embed_document(_with_pairs(f"{title}\n{text}", every=True)))

    def embed_query(self, text: str) -> SparseVector:
        """Weights of a query; empty when it has only stop words."""
        return _vector(self._model.embed_query(_with_pairs(text, every=False)))


@lru_cache(maxsize=32)
def bm25_of(language: str) -> Bm25:
    """The model of a language."""
    return Bm25(language)


def _with_pairs(text: str, *, every: bool) -> str:
    """The text with its unspaced runs cut into pairs. ``every``: characters on their own as well, to be found by one.

    A pair is written in digits, which no stemmer changes and no tokenizer cuts.
    """

    def pairs(run: re.Match[str]) -> str:
        codes = [f"{ord(character):06d}" for character in run[0]]
        terms = [first + second for first, second in itertools.pairwise(codes)]
        return " ".join(["", *terms, *(codes if every or not terms else []), ""])

    return _UNSPACED.sub(pairs, unicodedata.normalize("NFKC", text))


def _vector(vector: qdrant.SparseVector) -> SparseVector:
    return SparseVector(tuple(vector.indices), tuple(vector.values))


class Bm25Scorer:
    """Scores of given texts, as the engines make them; the IDF is computed over these texts."""

    def __init__(self, texts: Sequence[tuple[str, str]], language: str = "") -> None:
        """``texts``: titles and texts. ``language``: of their words; empty: the default's."""
        self._model = bm25_of(language or DEFAULT_LANGUAGE)
        self._count = len(texts)
        self._postings: dict[int, list[tuple[int, float]]] = {}
        for number, (title, text) in enumerate(texts):
            vector = self._model.embed_passage(title, text)
            for term, weight in zip(vector.indices, vector.values, strict=True):
                self._postings.setdefault(term, []).append((number, weight))

    def scores(self, question: str) -> NDArray[np.float64]:
        """Of each text; 0 where it shares no word with the question."""
        scores: NDArray[np.float64] = self.by_word(question).sum(axis=1)
        return scores

    def by_word(self, question: str) -> NDArray[np.float64]:
        """What each of the question's words adds to each text's score, [texts, words]."""
        query = self._model.embed_query(question)
        scores = np.zeros((len(query.indices), self._count))
        for word, (term, weight) in enumerate(zip(query.indices, query.values, strict=True)):
            found = self._postings.get(term, [])
            idf = math.log1p((self._count - len(found) + 0.5) / (len(found) + 0.5))
            for number, value in found:
                scores[word, number] = idf * weight * value
        return scores.T
