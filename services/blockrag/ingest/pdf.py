"""PDF → text, page by page, through pypdf."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from pypdf import PdfReader
from pypdf.errors import DependencyError, PyPdfError

from blockrag.errors import InvalidRequestError

_HYPHENATED = re.compile(r"(?<=[a-zà-ÿ])-\n(?=[a-zà-ÿ])")
_SURROGATES_AND_CONTROLS = re.compile("[\ud800-\udfff\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What damaged files make pypdf raise besides its own errors.
_DAMAGE = (PyPdfError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ArithmeticError,
           AssertionError)  # fmt: skip


class PdfText:
    """An open pdf: its title and the text of its pages."""

    def __init__(self, reader: PdfReader) -> None:
        self._reader = reader
        self.title = _clean(_title_of(reader)).strip()

    def pages(self) -> Iterator[str]:
        """Each page's text, ended by an empty line; words that were hyphenated at a line's end are joined."""
        try:
            count = len(self._reader.pages)
        except _DAMAGE as error:
            raise _damaged(error) from error
        for number in range(count):
            try:
                text = self._reader.pages[number].extract_text()
            except _DAMAGE as error:
                raise _damaged(error, f"page {number + 1}: ") from error
            if text and (text := _HYPHENATED.sub("", _clean(text)).strip()):
                yield text + "\n\n"


def open_pdf(spool: BinaryIO) -> PdfText:
    """Raises ``InvalidRequestError`` for what is no pdf, is damaged, or needs a password."""
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
    return PdfText(reader)


def _title_of(reader: PdfReader) -> str:
    try:
        metadata = reader.metadata
        return (metadata.title if metadata else None) or ""
    except _DAMAGE:
        return ""


def _clean(text: str) -> str:
    return _SURROGATES_AND_CONTROLS.sub("", text)


def _damaged(error: BaseException, where: str = "") -> InvalidRequestError:
    return InvalidRequestError("content", f"the pdf is damaged: {where}{str(error)[:200] or type(error).__name__}")
