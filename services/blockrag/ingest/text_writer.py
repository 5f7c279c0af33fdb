"""Text as it grows from a page: spaces collapsed, blocks apart."""

from __future__ import annotations

import re

_BREAKS = ("", "\n", "\n\n")
_SPACES = re.compile(r"[ \t\n\r\f\xa0]+")


class TextWriter:
    """Collects pieces of text and the edges of blocks between them."""

    def __init__(self) -> None:
        self.verbatim = 0
        """Above 0: spaces and newlines are text."""
        self._parts: list[str] = []
        self._break = ""
        self._ends_with_space = True

    def write(self, text: str) -> None:
        """Text within a block."""
        if not self.verbatim:
            text = _SPACES.sub(" ", text)
            if self._ends_with_space or self._break:
                text = text.lstrip(" ")
        if text:
            self._append(text)

    def write_line(self, line: str) -> None:
        """A line as it is."""
        self._append(line)
        self.edge("\n")

    def edge(self, kind: str) -> None:
        """What comes next is apart by a newline or by an empty line."""
        self._break = max(self._break, kind, key=_BREAKS.index)

    @property
    def pieces(self) -> int:
        """How many were written: a place for ``line``."""
        return len(self._parts)

    def text(self) -> str:
        """All of it."""
        return "".join(self._parts).rstrip()

    def line(self, start: int = 0) -> str:
        """What was written since ``start``, on one line."""
        return " ".join("".join(self._parts[start:]).split())

    def _append(self, text: str) -> None:
        if self._parts:
            if self._break:
                self._parts[-1] = self._parts[-1].rstrip()
            self._parts.append(self._break)
        self._break = ""
        self._parts.append(text)
        self._ends_with_space = text[-1].isspace()
