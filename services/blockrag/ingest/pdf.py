"""PDF → titles and text, page by page, through pypdf.

A page whose content cannot be decoded is an error that names it: pypdf by itself gives such a page no text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from pypdf import PdfReader
from pypdf.errors import DependencyError, PyPdfError
from pypdf.generic import ArrayObject, DictionaryObject, IndirectObject, NullObject, StreamObject

from blockrag.characters import clean_text
from blockrag.errors import InvalidRequestError

# A letter that is not a capital, a hyphen of any kind at a line's end, and a letter that begins no sentence.
_HYPHENATED = re.compile(r"(?<=[^\W\d_])[-\u2010\u058a][ \t]*\n[ \t]*(?=([^\W\d_]))")
_MAX_TREE_DEPTH = 100
# What damaged files make pypdf raise besides its own errors.
_DAMAGE = (PyPdfError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ArithmeticError,
           AssertionError, zlib.error)  # fmt: skip


def read_pdf(spool: BinaryIO) -> tuple[list[str], Iterator[str]]:
    """Titles to choose from, and each page's text, ended by an empty line.

    Words that were hyphenated at a line's end are joined; what was filled into a form stands below the page's text.
    Raises ``InvalidRequestError``, also while pages are read, for what is no pdf, is damaged (naming the page), or
    needs a password.
    """
    spool.seek(0)
    if b"%PDF-" not in spool.read(1024):
        raise InvalidRequestError("content", "is not a pdf: it does not start with %PDF-")
    spool.seek(0)
    try:
        reader = PdfReader(spool, strict=False)
        # Many files are encrypted with an empty password only to forbid printing.
        locked = reader.is_encrypted and not reader.decrypt("")
    except DependencyError:
        locked = True
    except _DAMAGE as error:
        raise _damaged(error) from error
    if locked:
        raise InvalidRequestError("content", "the pdf is encrypted; remove its password first")
    return _titles_of(reader), _pages(reader)


def join_hyphenated(text: str) -> str:
    """Joins words that a hyphen breaks at a line's end, in any script; before a capital the hyphen stays."""

    def joined(match: re.Match[str]) -> str:
        before, after = match.string[match.start() - 1], match[1]
        is_word = not (before.isupper() or after.isupper() or after.istitle())
        return "" if is_word else match[0]

    return _HYPHENATED.sub(joined, text)


def _pages(reader: PdfReader) -> Iterator[str]:
    try:
        _check_tree(reader)
        count = len(reader.pages)
    except _DAMAGE as error:
        raise _damaged(error) from error
    for number in range(count):
        try:
            page = reader.pages[number]
            _check_streams(page.get("/Contents"), page.get("/Resources"), set())
            text = page.extract_text()
            filled = "\n".join(_filled_in(page))
        except _DAMAGE as error:
            raise _damaged(error, f"page {number + 1}: ") from error
        parts = [join_hyphenated(clean_text(part)).strip() for part in (text, filled) if part]
        if whole := "\n\n".join(part for part in parts if part):
            yield whole + "\n\n"


def _check_tree(reader: PdfReader) -> None:
    """Raises for a page that the tree names and the file does not hold."""
    pages = reader.root_object["/Pages"]
    waiting: list[tuple[Any, int]] = [(pages, 0)]
    seen: set[int] = set()
    number = 0
    while waiting:
        raw, depth = waiting.pop()
        if isinstance(raw, IndirectObject):
            if raw.idnum in seen:
                continue
            seen.add(raw.idnum)
        node = raw.get_object() if raw is not None else None
        if isinstance(node, DictionaryObject) and "/Kids" in node and depth < _MAX_TREE_DEPTH:
            kids: Any = node["/Kids"].get_object()
            waiting.extend((kid, depth + 1) for kid in reversed(kids))
            continue
        number += 1
        if not isinstance(node, DictionaryObject):
            raise _damaged(ValueError("the file does not hold it"), f"page {number}: ")


def _check_streams(contents: Any, resources: Any, seen: set[int]) -> None:
    """Raises ``ValueError`` where a stream that may hold a page's text cannot be decoded whole."""
    contents = _resolved(contents)
    for part in contents if isinstance(contents, ArrayObject) else [contents]:
        stream = _resolved(part)
        if isinstance(stream, StreamObject):
            _check_stream(stream)
        elif part is not None and not isinstance(stream, NullObject):
            raise ValueError("its content is no stream")
        elif isinstance(part, IndirectObject):
            raise ValueError("the file does not hold its content")
    resources = _resolved(resources)
    objects = _resolved(resources.get("/XObject")) if isinstance(resources, DictionaryObject) else None
    if not isinstance(objects, DictionaryObject):
        return
    for part in objects.values():
        if isinstance(part, IndirectObject):
            if part.idnum in seen:
                continue
            seen.add(part.idnum)
        form = _resolved(part)
        if isinstance(form, StreamObject) and form.get("/Subtype") == "/Form":
            _check_streams(form, form.get("/Resources"), seen)


def _check_stream(stream: StreamObject) -> None:
    filters = _resolved(stream.get("/Filter"))
    names = list(filters) if isinstance(filters, ArrayObject) else [filters]
    if not names or names[0] not in ("/FlateDecode", "/Fl"):
        stream.get_data()
        return
    data = stream._data  # pypdf decodes damaged data to nothing; only the raw bytes say so
    if not data.strip():
        return
    # A missing or wrong checksum at the end loses nothing, so only the deflate data within is looked at.
    inner = zlib.decompressobj(-15)
    try:
        while data:
            chunk, data = data[: 1 << 20], data[1 << 20 :]
            inner.decompress(chunk[2:] if len(data) + len(chunk) == len(stream._data) else chunk)
    except zlib.error as error:
        raise ValueError(f"its content cannot be decompressed ({error})") from None
    if not inner.eof:
        raise ValueError("its content is cut off")


def _filled_in(page: Any) -> Iterator[str]:
    """What was filled into the page's form, with the names of the fields."""
    annotations = _resolved(page.get("/Annots"))
    if not isinstance(annotations, ArrayObject):
        return
    for annotation in annotations:
        widget = _resolved(annotation)
        if not isinstance(widget, DictionaryObject) or widget.get("/Subtype") != "/Widget":
            continue
        kind, value = _inherited(widget, "/FT"), _inherited(widget, "/V")
        if kind not in ("/Tx", "/Ch", "/Btn") or value is None:
            continue
        if kind == "/Btn":
            # A button that was pressed; which of a group, its widget's state says.
            state = _resolved(widget.get("/AS")) or value
            if value in ("/Off", "") or state == "/Off" or not str(value).startswith("/"):
                continue
            value = "yes" if str(value) in ("/Yes", "/On", "/1") else str(value).lstrip("/")
        values = [str(item) for item in value] if isinstance(value, ArrayObject) else [_text_of(value)]
        if text := ", ".join(item.strip() for item in values if item.strip()):
            name = str(_inherited(widget, "/TU") or _inherited(widget, "/T") or "").strip()
            yield f"{name}: {text}" if name else text


def _text_of(value: Any) -> str:
    if isinstance(value, StreamObject):
        return value.get_data().decode("utf-8", "replace")
    return str(value)


def _inherited(widget: DictionaryObject, key: str) -> Any:
    node: Any = widget
    for _ in range(_MAX_TREE_DEPTH):
        if not isinstance(node, DictionaryObject):
            return None
        if key in node:
            return _resolved(node[key])
        node = _resolved(node.get("/Parent"))
    return None


def _resolved(value: Any) -> Any:
    return value.get_object() if isinstance(value, IndirectObject) else value


def _titles_of(reader: PdfReader) -> list[str]:
    try:
        metadata = reader.metadata
        return [str(metadata.title or "")] if metadata else []
    except _DAMAGE:
        return []


def _damaged(error: BaseException, where: str = "") -> InvalidRequestError:
    if isinstance(error, InvalidRequestError):
        return error
    return InvalidRequestError("content", f"the pdf is damaged: {where}{str(error)[:200] or type(error).__name__}")
