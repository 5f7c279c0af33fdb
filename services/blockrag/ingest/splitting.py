"""Text → passages that fit a block, split by semantic-text-splitter.

Passages end with paragraphs where they can, else with sentences, else with words; only a word that is longer than a
passage is cut. Every character of the text but surrounding white space is in exactly one passage, in order; only the
headings of a long table are repeated.

The text is split in windows: all passages of a window but the last are final, the last one is split again with what
follows. So memory is bounded, and where a window ends leaves hardly a mark.

Tokens of a passage's block are counted fast enough for documents of tens of megabytes. And which of the titles that a
file offers is one.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from semantic_text_splitter import MarkdownSplitter, TextSplitter

from blockrag.characters import clean_line
from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import known_suffix
from blockrag.ingest.tables_and_runs import Solid, Span, Table, blocks_of, cut_solid, pack_table
from blockrag.modeling.running_text import field_ids, running_text
from blockrag.modeling.template import BundleTokenizer, PromptTemplate

_CACHED_WORDS = 200_000
_CACHED_WORD_CHARS = 32


class BlockCounter:
    """Tokens of a passage's block, counted as ``PromptTemplate.passage_ids`` makes them.

    The template tokenises title and text apart, so a block's count is a constant of its title plus the text's count.
    """

    def __init__(self, template: PromptTemplate, tokenizer: BundleTokenizer) -> None:
        before, found, _ = template.passage.partition("{text}")
        if not found:
            raise ValueError("the template's passage has no {text}")
        self._template = template
        self._tokenizer = tokenizer
        self._carried = before[len(before.rstrip(" ")) :]
        self._fast = running_text(tokenizer)
        self._word_counts = _WordCounts(self.text_count)
        # Calling a transformers tokenizer sets flags on it.
        self._calling = threading.Lock()

    def fingerprint(self) -> str:
        """Changes when a text may get another count."""
        digest = hashlib.sha256(self._template.passage.encode())
        if self._fast is not None:
            digest.update(self._fast.described.encode())
        return digest.hexdigest()

    def overhead(self, title: str) -> int:
        """Tokens of a block with this title beyond those of its text."""
        with self._calling:
            block = self._template.passage_ids(self._tokenizer, title, "")
        return len(block) - self.text_count("")

    def text_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text takes in a block."""
        pieces = [self._carried + text for text in texts]
        if self._fast is not None:
            return [len(ids) for ids in self._fast.ids_of(pieces)]
        return [len(field_ids(self._tokenizer, piece)) if piece else 0 for piece in pieces]

    def text_count(self, text: str) -> int:
        """Tokens that one text takes in a block."""
        return self.text_counts([text])[0]

    def estimate(self, text: str) -> int:
        """About ``text_count``, from the counts of its words, which are kept.

        Right for vocabularies that never merge across a space, up to words that follow a newline.
        """
        return text.count("\n") + sum(map(self._word_counts.__getitem__, text.split()))


class _WordCounts(dict[str, int]):
    """Counts of words, kept up to a limit. A dict, so that a known word costs no Python call."""

    def __init__(self, count: Callable[[str], int]) -> None:
        super().__init__()
        self._count = count

    def __missing__(self, word: str) -> int:
        count = self._count(word)
        if len(word) <= _CACHED_WORD_CHARS:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = count
        return count


MAX_TITLE_CHARS = 300
"""Longest title that is taken from a file."""

# What programs write before the name of the file that they made.
_WRITTEN_BY = re.compile(
    r"(?:Microsoft\s+(?:Office\s+)?(?:Word|Excel|PowerPoint|Publisher|Visio)|Print)\s+-\s+", re.IGNORECASE
)
_OFFICE_SUFFIX = re.compile(
    r"\.(?:docx?|dotx?|odt|rtf|xlsx?|ods|pptx?|odp|pub|pages|tex|dvi|indd|qxd|wpd|fm|pdf|txt|md|html?)$", re.IGNORECASE
)
# What programs call what nobody has named, by language; a number may follow.
_NAMELESS = """
untitled | untitled document | untitled page | untitled presentation | untitled design | untitled spreadsheet | no title
title | page title | your title | your title here | anonymous | (anonymous) | unknown | none | null | temp | tmp | con
document | new document | new page | page | webpage | website | index | home | homepage | default | about:blank | blank
draft | test | scan | scanned document | image | file | print | sheet | book | workbook | layout | slide | presentation
powerpoint presentation | unbenannt | unbenanntes dokument | neues dokument | dokument | ohne titel | mappe | tabelle
powerpoint-präsentation | sans titre | sans-titre | document sans titre | document sans nom | nouveau document
classeur | présentation powerpoint | sin título | sin titulo | documento | documento sin título | nuevo documento
libro | presentación de powerpoint | sem título | documento sem título | apresentação do powerpoint | senza titolo
senza nome | nuovo documento | presentazione di powerpoint | naamloos | naamloos document | uten navn | namnlös
nimetön | bez názvu | bez tytułu | névtelen | dokumentas | без названия | без имени | без назви | документ
χωρίς τίτλο | έγγραφο | başlıksız | adsız | belge | 無題 | 名称未設定 | 文書 | ドキュメント | 无标题 | 未命名 | 文档
無標題 | 新建文档 | 제목 없음 | 제목없음 | 문서
"""
_APART = r"[|\n]"
_NO_TITLE = re.compile(
    rf"(?:{'|'.join(re.escape(name.strip()) for name in re.split(_APART, _NAMELESS) if name.strip())})"
    r"[\s_-]*(?:\(?\d+\)?)?",
    re.IGNORECASE,
)


def choose_title(candidates: Iterable[str]) -> str:
    """The first that says something, on one line; empty: none does."""
    for candidate in candidates:
        title = clean_line(candidate)
        title = _WRITTEN_BY.sub("", title, count=1) if _WRITTEN_BY.match(title) else title
        # Whoever named the file named the document; its suffix says nothing.
        title = _OFFICE_SUFFIX.sub("", title).strip()
        if title and not _NO_TITLE.fullmatch(title) and any(character.isalnum() for character in title):
            return title[:MAX_TITLE_CHARS].rstrip()
    return ""


def title_from_id(document_id: str) -> str:
    """``reports/annual_report-2024.txt`` → ``annual report-2024``: without folders and a suffix that is known."""
    name = PurePosixPath(document_id).name
    suffix = known_suffix(name)
    name = name[: -len(suffix)] if suffix and name != suffix else name
    return " ".join(name.replace("_", " ").split()) or document_id


WINDOW_CHARS = 1 << 16
"""Characters split at a time, at least."""
_VERSION = "2"
_LONGEST_WORD = 2000
_CUT_MARK = "…"
# What looks like a heading: at most this share of a passage, and no end of a sentence.
_HEADING_SHARE = 4
_SENTENCE_ENDS = frozenset(".!?…。！？\"”')]")


@dataclass(frozen=True)
class FittedTitle:
    """A title as every passage's block repeats it."""

    text: str
    text_tokens: int
    """Tokens that it leaves for a passage's text."""


class PassageSplitter:
    """Splits for one bundle's template and tokenizer. Threads may share it."""

    def __init__(self, template: PromptTemplate, tokenizer: BundleTokenizer, passage_tokens: int) -> None:
        """``passage_tokens``: most tokens of a passage's block, title included."""
        self._counter = BlockCounter(template, tokenizer)
        self._passage_tokens = passage_tokens
        parts = (_VERSION, str(passage_tokens), self._counter.fingerprint())
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        """Changes when a document may be split another way."""

    def fit_title(self, title: str) -> FittedTitle:
        """A title of more than half of a block's tokens is cut at a word, so that room for text is left."""
        budget = self._passage_tokens // 2
        overhead = self._counter.overhead(title)
        if overhead <= budget:
            return FittedTitle(title, self._passage_tokens - overhead)
        # Most characters that fit; counts grow with length but for a token or so, which the loop below settles.
        low, high = 0, len(title)
        while low < high:
            middle = (low + high + 1) // 2
            if self._counter.overhead(_cut(title, middle)) <= budget:
                low = middle
            else:
                high = middle - 1
        while low and self._counter.overhead(_cut(title, low)) > budget:
            low -= 1
        fitted = _cut(title, low) if low else ""
        text_tokens = self._passage_tokens - self._counter.overhead(fitted)
        if text_tokens < 1:
            raise InvalidRequestError("title", "leaves no room for text in a passage")
        return FittedTitle(fitted, text_tokens)

    def split(self, title: FittedTitle, pieces: Iterable[str], *, markdown: bool = False) -> Iterator[str]:
        """Passages' texts, lazily; ``pieces`` concatenated are the text.

        A table that takes several passages repeats the line of its headings in each.
        """
        tokens = title.text_tokens
        splitter = self._splitter(tokens, markdown)
        text = ""
        for piece in pieces:
            text += piece
            if len(text) < WINDOW_CHARS:
                continue
            spans = self._spans(text, splitter, tokens, final=False)
            if spans:
                # A last one that hardly anything but white space belongs to would be split again and again.
                goes_on = len(text) - spans[-1].start < 4 * WINDOW_CHARS
                yield from self._checked([span.text for span in (spans[:-1] if goes_on else spans)], tokens)
                text = spans[-1].repeated + text[spans[-1].start :] if goes_on else ""
            else:
                text = ""
        yield from self._checked([span.text for span in self._spans(text, splitter, tokens, final=True)], tokens)

    def _spans(self, text: str, splitter: TextSplitter | MarkdownSplitter, tokens: int, *, final: bool) -> list[Span]:
        """The passages of a window. What the library splits badly, it does not see."""
        spans: list[Span] = []
        for block in blocks_of(text):
            if isinstance(block, Table):
                lead = spans.pop() if spans and self._is_heading(spans[-1].text, tokens) else None
                goes_on = not final and block.start + len(block.text) >= len(text.rstrip())
                packed = pack_table(block, lead, self._counter.estimate, tokens, goes_on=goes_on)
                if packed is not None:
                    spans += packed
                    continue
                spans += [lead] if lead else []
            if isinstance(block, Solid):
                spans += cut_solid(block, self._counter.text_counts, tokens)
                continue
            found = self._with_headings(block.text, splitter.chunk_indices(block.text), tokens)
            spans += [Span(block.start + start, chunk) for start, chunk in found]
        return spans

    def _is_heading(self, chunk: str, tokens: int) -> bool:
        return chunk[-1] not in _SENTENCE_ENDS and self._counter.estimate(chunk) <= tokens // _HEADING_SHARE

    def _with_headings(self, text: str, spans: list[tuple[int, str]], tokens: int) -> list[tuple[int, str]]:
        """A heading alone is no passage: it takes the first sentences of what follows.

        ``spans``: start and text of each passage within ``text``.
        """
        waiting = deque(spans)
        joined: list[tuple[int, str]] = []
        while waiting:
            start, chunk = waiting.popleft()
            size = self._counter.estimate(chunk)
            if not waiting or not self._is_heading(chunk, tokens):
                joined.append((start, chunk))
                continue
            next_start, following = waiting.popleft()
            room = TextSplitter.from_callback(self._counter.estimate, tokens - size - 1)
            offset, first = room.chunk_indices(following)[0]
            end = next_start + offset + len(first)
            joined.append((start, text[start:end]))
            rest = following[offset + len(first) :].lstrip()
            if rest:
                waiting.appendleft((next_start + len(following) - len(rest), rest))
        return joined

    def _splitter(self, tokens: int, markdown: bool) -> TextSplitter | MarkdownSplitter:
        kind = MarkdownSplitter if markdown else TextSplitter
        return kind.from_callback(lambda text: self._size(text, tokens), tokens)

    def _size(self, text: str, tokens: int) -> int:
        # The splitter asks for long stretches only to learn that they do not fit.
        if len(text) > _LONGEST_WORD and len(text) > 64 * tokens:
            return tokens + len(text)
        return self._counter.estimate(text)

    def _checked(self, chunks: list[str], tokens: int) -> Iterator[str]:
        # The library keeps separators that Python counts as space (U+001F), and nothing else is in such a chunk.
        chunks = [chunk for chunk in chunks if chunk.strip()]
        # The estimate is off by a token at times: what does not fit is split again, counting truly.
        for chunk, count in zip(chunks, self._counter.text_counts(chunks), strict=True):
            if count <= tokens:
                yield chunk
            else:
                for part in TextSplitter.from_callback(self._counter.text_count, tokens).chunks(chunk):
                    if part.strip():
                        yield from self._halved(part, tokens)

    def _halved(self, text: str, tokens: int) -> Iterator[str]:
        # The splitter takes for granted that a longer text has more tokens; a byte-level merge may break that.
        if len(text) < 2 or self._counter.text_count(text) <= tokens:
            yield text
            return
        middle = len(text) // 2
        space = text.rfind(" ", 1, middle)
        middle = space if space > 0 else middle
        for half in (text[:middle].strip(), text[middle:].strip()):
            if half:
                yield from self._halved(half, tokens)


def _cut(title: str, length: int) -> str:
    if length >= len(title):
        return title
    kept = title[:length]
    if not title[length].isspace() and " " in kept:
        kept = kept[: kept.rindex(" ")]
    return kept.rstrip() + _CUT_MARK
