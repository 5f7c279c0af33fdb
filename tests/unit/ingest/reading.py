"""Files → what is made of them, in this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from blockrag.ingest.media import MediaType
from blockrag.ingest.parsing import parse
from blockrag.ingest.pipeline import PreparedDocument, SourceDocument, prepare_documents
from blockrag.ingest.splitting import PassageSplitter
from blockrag.ingest.titles import title_from_id
from tests.unit.ingest.tokenizers import TEMPLATE, WordTokenizer

DATA = Path(__file__).resolve().parents[2] / "data"
CASES = DATA / "cases"
SPLITTER = PassageSplitter(TEMPLATE, WordTokenizer(), 32)


def parsed(data: bytes | str, media_type: MediaType, document_id: str = "folder/my_file.txt") -> tuple[str, str]:
    """Title and text of a file."""
    text = io.BytesIO()
    file = parse(io.BytesIO(data.encode() if isinstance(data, str) else data), text, media_type, {})
    return file.title or title_from_id(document_id), text.getvalue().decode()


def prepare(data: bytes | str, document_id: str = "a.txt", **options: Any) -> list[tuple[PreparedDocument, list[str]]]:
    """The documents of a file with their passages."""
    spool = io.BytesIO(data.encode() if isinstance(data, str) else data)
    with prepare_documents(spool, SourceDocument(document_id, **options), SPLITTER) as prepared:
        return [(document, list(document.passages)) for document in prepared]


def case(name: str) -> list[tuple[PreparedDocument, list[str]]]:
    """The documents of one of the case files."""
    return prepare((CASES / name).read_bytes(), name)
