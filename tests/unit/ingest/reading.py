"""Files → what is made of them, in this process."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from blockrag.ingest.media import MediaType
from blockrag.ingest.parsing import parse
from blockrag.ingest.pipeline import PreparedDocument, SourceDocument, check_source, check_spool, documents_of
from blockrag.ingest.splitting import PassageSplitter, title_from_id
from tests.unit.ingest.tokenizers import TEMPLATE, WordTokenizer

DATA = Path(__file__).resolve().parents[2] / "data"
CASES = DATA / "cases"
SPLITTER = PassageSplitter(TEMPLATE, WordTokenizer(), 32)


def parsed(data: bytes | str, media_type: MediaType, document_id: str = "folder/my_file.txt") -> tuple[str, str]:
    """Title and text of a file."""
    text = io.BytesIO()
    file = parse(io.BytesIO(data.encode() if isinstance(data, str) else data), text, media_type, {})
    return file.title or title_from_id(document_id), text.getvalue().decode()


@contextmanager
def prepare_documents(
    spool: BinaryIO, source: SourceDocument, splitter: PassageSplitter
) -> Iterator[Iterator[PreparedDocument]]:
    """The documents of one received file, as ``ParserPool.prepare`` makes them, without its processes."""
    checked = check_source(source)
    check_spool(spool)
    with cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=1 << 20)) as text:
        yield documents_of(parse(spool, text, checked.media_type, checked.source.metadata), text, checked, splitter)


def prepare(data: bytes | str, document_id: str = "a.txt", **options: Any) -> list[tuple[PreparedDocument, list[str]]]:
    """The documents of a file with their passages."""
    spool = io.BytesIO(data.encode() if isinstance(data, str) else data)
    with prepare_documents(spool, SourceDocument(document_id, **options), SPLITTER) as prepared:
        return [(document, list(document.passages)) for document in prepared]


def case(name: str) -> list[tuple[PreparedDocument, list[str]]]:
    """The documents of one of the case files."""
    return prepare((CASES / name).read_bytes(), name)
