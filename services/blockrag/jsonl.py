"""Data files that users bring: one JSON object per line, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockrag.errors import SetupError


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file in order, each with its place ``file:line`` for messages; empty lines are passed over.

    Raises SetupError naming file and line of what is no JSON object, or the file that cannot be read.
    """
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(f"{path}:{number}", line)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SetupError(f"{path}: {told}") from error


def _object(place: str, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{place}: no JSON: {error}") from error
    if not isinstance(values, dict):
        raise SetupError(f"{place}: must be a JSON object")
    return values
