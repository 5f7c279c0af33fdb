"""The user's cache: what can be made again, kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "BLOCKRAG_CACHE"
"""Environment variable that names the directory. No setting: training and the engine know no settings."""


def cache_dir() -> Path:
    """``BLOCKRAG_CACHE``, else ``blockrag`` in ``XDG_CACHE_HOME``, else ``~/.cache/blockrag``; it need not exist.

    Raises RuntimeError where the user has no home directory.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockrag"
