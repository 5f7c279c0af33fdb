"""Converted GGUF files: one Hugging Face checkpoint per file and machine, in the user's cache.

``bases/SHA-vN`` in ``cache_dir()``: named after the file's SHA-256 and the converter's version, so nothing in it is
ever out of date (``blockrag.modeling.made``). Contents are compared when a bundle is verified.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from blockrag.errors import BundleError
from blockrag.modeling.cache import CACHE_VARIABLE, cache_dir
from blockrag.modeling.files import file_sha256
from blockrag.modeling.made import changed_file, made

CONVERTER = 1
"""Version of what ``gguf_file.convert`` writes: with a change of it, every file is converted again."""


def converted(path: Path, sha256: str) -> Path:
    """The checkpoint that the GGUF file ``path`` is as a directory; converted now if it is not in the cache.

    Raises BundleError when the file's content is not ``sha256``, when it cannot be read (see ``open_gguf``) and when
    the cache cannot be written: read-only, full. Then nothing is left behind.
    """
    folder = _folder(sha256)
    try:
        return made(folder, lambda staging: _convert(path, sha256, staging), path.name)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{path} is converted once per machine, and {folder.parent} cannot take it: {error}. Name a directory with "
            f"room for some four times the file's {path.stat().st_size / 2**20:.0f} MiB in {CACHE_VARIABLE}"
        ) from error


def check_converted(sha256: str, digest: Callable[[Path], str] = file_sha256) -> None:
    """Compare every file of the converted checkpoint with what was written, if there is one.

    ``digest`` gives a file's SHA-256. Raises BundleError naming the file that differs.
    """
    folder = _folder(sha256)
    changed = changed_file(folder, digest)
    if changed is not None:
        raise BundleError(f"{changed}: content differs from what was converted; delete {folder}, and it is made again")


def _folder(sha256: str) -> Path:
    try:
        return cache_dir() / "bases" / f"{sha256}-v{CONVERTER}"
    except RuntimeError as error:
        raise BundleError(f"no directory for converted files: {error}; name one in {CACHE_VARIABLE}") from error


def _convert(path: Path, sha256: str, staging: Path) -> None:
    try:
        from blockrag.modeling.gguf_file import convert, open_gguf  # what is converted already needs neither
    except ImportError as error:
        raise BundleError(f"{path}: reading GGUF files needs the package gguf: pip install gguf ({error})") from error

    if (found := file_sha256(path)) != sha256:
        raise BundleError(f"{path}: content differs: SHA-256 {found}, not {sha256}")
    convert(open_gguf(path), staging)
