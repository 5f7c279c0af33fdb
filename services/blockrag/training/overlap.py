"""Keeping what is evaluated on out of training: texts that share a run of words with a development text."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORDS = re.compile(r"[a-z0-9]+")


class OverlapFilter:
    """Finds texts that share ``length`` words in a row with one of the texts it was made of.

    Case, punctuation and spacing do not count. Of the texts tested only every ``stride``-th place is looked at, so
    that a shared run of ``length + stride - 1`` words is always found and a shorter one sometimes.
    """

    def __init__(self, texts: Iterable[str], length: int = 12, stride: int = 5) -> None:
        self._length = length
        self._stride = stride
        self._known: set[int] = set()
        for text in texts:
            words = _WORDS.findall(text.lower())
            self._known.update(hash(tuple(words[n : n + length])) for n in range(len(words) - length + 1))

    def __call__(self, text: str) -> bool:
        """Whether ``text`` shares a run of words."""
        if not self._known:
            return False
        words = _WORDS.findall(text.lower())
        places = range(0, len(words) - self._length + 1, self._stride)
        return any(hash(tuple(words[n : n + self._length])) in self._known for n in places)
