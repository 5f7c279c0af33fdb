"""What a model read word for word of each passage, and what only as one slot per chunk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from blockrag.results import ChunkFormName, Citation, Completion, Usage

_SHOWN_CHARS = 18
"""Of either end of what was compressed."""


def reading_lines(completion: Completion) -> Iterator[Text]:
    """A paragraph for each passage in the prompt; nothing when the answer was not asked to compress.

    What was read word for word is printed as it is. What was compressed is dimmed and stands in ‹ ›, shortened to its
    beginning and end.
    """
    for citation in completion.citations:
        if citation.in_prompt and any(chunk.text for chunk in citation.chunks):
            yield _passage(citation)


def compression_note(usage: Usage) -> str:
    """How small the passages became; empty when nothing was compressed."""
    if not usage.compressed_chunks:
        return ""
    return f"{usage.context_tokens} passage tokens, {usage.compressed_chunks} chunks of them compressed"


def _passage(citation: Citation) -> Text:
    line = Text(f"  [{citation.index + 1}] ", style="dim")
    for form, run in groupby(citation.chunks, key=lambda chunk: chunk.form):
        words = "".join(chunk.text for chunk in run)
        line.append(*_shown(form, words))
    return line


def _shown(form: ChunkFormName, words: str) -> tuple[str, str]:
    if form == "expanded":
        return words, "default"
    if len(words) > 2 * _SHOWN_CHARS + 3:
        words = f"{words[:_SHOWN_CHARS].rstrip()} … {words[-_SHOWN_CHARS:].lstrip()}"
    lead = " " if words.startswith(" ") else ""
    return f"{lead}‹{words.strip()}›", "dim"
