"""Result files that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from blockrag.errors import SetupError


def write_together(out: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into the directory ``out``, made where it is missing; older files of these names are replaced.

    Everything is written elsewhere first and then moved, so that an interrupt leaves no half of a file. Raises
    ``SetupError`` where the directory cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            for name in files:
                (Path(folder) / name).replace(out / name)
    except OSError as error:
        raise SetupError(f"{out}: {error.strerror or error}") from error
