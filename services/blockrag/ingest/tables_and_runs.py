"""What in a text is split by rules of its own: long tables, and long runs without a space."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from semantic_text_splitter import TextSplitter

SOLID_CHARS = 256
"""A run without a space of at least so many characters is cut by its tokens: Chinese paragraphs, base64, minified code.
The library takes seconds for 64 KB of it."""

_FILLED = 0.9
_AT_A_TIME = 64
_SOLID = re.compile(rf"\S{{{SOLID_CHARS},}}")
# A line of dashes below a line of headings, as Markdown's tables have it.
_DASHES = re.compile(r"^(?=[^\n]*\|)[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$", re.MULTILINE)
_STOPS = re.compile(r"[。！？!?…؟।۔。][」』）】”’\"')]*|[.](?=\D)")
_PAUSES = re.compile(r"[；;，,、：:|/&]")


@dataclass(frozen=True)
class Span:
    """A passage's text and where it starts in its window."""

    start: int
    text: str
    repeated: str = ""
    """What stands at its beginning and not at that place."""


@dataclass(frozen=True)
class Block:
    """Text that is split at paragraphs, sentences, words, and where it starts in its window."""

    start: int
    text: str


class Solid(Block):
    """A run without a space."""


class Table(Block):
    """Headings, dashes and rows, a line each."""

    @property
    def head(self) -> str:
        """Headings and dashes, with the newline that ends them."""
        first = self.text.index("\n") + 1
        return self.text[: self.text.index("\n", first) + 1]


def blocks_of(text: str) -> Iterator[Block]:
    """The blocks of a window in order; concatenated they are the window."""
    place = 0
    for start, end, kind in sorted([*_tables(text), *_solids(text)]):
        if start < place:
            continue
        if text[place:start].strip():
            yield Block(place, text[place:start])
        yield Table(start, text[start:end]) if kind == "table" else Solid(start, text[start:end])
        place = end
    if text[place:].strip():
        yield Block(place, text[place:])


def pack_table(
    table: Table, lead: Span | None, size: Callable[[str], int], tokens: int, *, goes_on: bool
) -> list[Span] | None:
    """Passages of whole rows, each below the table's headings; None for a table that needs only one passage.

    ``lead``: a heading that stands above it, and stays with its first rows. ``goes_on``: more rows may follow.
    """
    head = table.head
    room = tokens - size(head)
    if room < tokens // 2 or (size(table.text) <= tokens and not goes_on):
        return None
    prefix = f"{lead.text}\n\n{head}" if lead else head
    left = room - (size(prefix) - size(head))
    start = lead.start if lead else table.start
    spans: list[Span] = []
    rows: list[str] = []

    def close(next_start: int) -> None:
        nonlocal prefix, left, start
        if rows:
            spans.append(Span(start, prefix + "\n".join(rows), head if spans else ""))
            rows.clear()
            prefix, left, start = head, room, next_start

    place = table.start + len(head)
    for line in table.text[len(head) :].splitlines(keepends=True):
        row = line.rstrip()
        needed = size(row) + 1
        if needed > left:
            close(place)
        if needed > left:
            for offset, part in TextSplitter.from_callback(size, max(left - 1, 1)).chunk_indices(row):
                rows.append(part)
                close(place + offset + len(part))
        elif row:
            rows.append(row)
            left -= needed
        place += len(line)
    close(place)
    return spans


def cut_solid(block: Solid, counts: Callable[[Sequence[str]], list[int]], tokens: int) -> list[Span]:
    """Passages of a run without a space: to the last end of a sentence that fits, else a pause, else anywhere.

    ``counts``: tokens of texts. How many characters fit is guessed from what was counted before, so that nearly
    every passage is counted once.
    """
    text = block.text
    sample = text[:SOLID_CHARS]
    chars, seen = len(sample), max(counts([sample])[0], 1)
    spans: list[Span] = []
    start = 0
    while start < len(text):
        size = max(int(_FILLED * tokens * chars / seen), 1)
        proposed: list[tuple[int, int]] = []
        while start < len(text) and len(proposed) < _AT_A_TIME:
            end = min(start + size, len(text))
            end = _good_end(text, start, end) if end < len(text) else end
            proposed.append((start, end))
            start = end
        found = counts([text[begin:end] for begin, end in proposed])
        chars, seen = sum(end - begin for begin, end in proposed), max(sum(found), 1)
        for (begin, end), count in zip(proposed, found, strict=True):
            parts = -(-count // tokens) if count > tokens else 1
            step = -(-(end - begin) // parts)
            spans += [
                Span(block.start + place, text[place : min(place + step, end)]) for place in range(begin, end, step)
            ]
    return spans


def _good_end(text: str, start: int, end: int) -> int:
    least = start + (end - start) // 2
    for pattern in (_STOPS, _PAUSES):
        found = [match.end() for match in pattern.finditer(text, least, end)]
        if found:
            return found[-1]
    return end


def _solids(text: str) -> Iterator[tuple[int, int, str]]:
    for match in _SOLID.finditer(text):
        yield match.start(), match.end(), "solid"


def _tables(text: str) -> Iterator[tuple[int, int, str]]:
    place = 0
    for dashes in _DASHES.finditer(text):
        above = text.rfind("\n", 0, max(dashes.start() - 1, 0)) + 1
        if above < place or dashes.start() == 0 or "|" not in text[above : dashes.start()]:
            continue
        end = dashes.end()
        while end < len(text):
            line_end = text.find("\n", end + 1)
            line_end = len(text) if line_end < 0 else line_end
            # The window's last line may be the beginning of a row.
            if "|" not in text[end:line_end] and (line_end < len(text) or not text[end:].strip()):
                break
            end = line_end
        if end > dashes.end():
            yield above, end, "table"
            place = end
