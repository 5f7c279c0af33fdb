"""What every module that checks files needs: hashes, JSON objects, safetensors headers."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from blockrag.errors import BundleError

DEFAULT_BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "reader"
"""The reader that ships with blockrag."""
PACKAGE_PREFIX = "package:"
"""What names a base inside an installed package begins with, where a path may stand too."""


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` that becomes it when the body succeeds and vanishes when it fails."""
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        # whoever reads it may not be the one who made it, and temporary files are their maker's alone
        for path in (staging, *staging.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was before."""
    written = path.with_name(f".{path.name}")
    written.write_text(text, encoding="utf-8")
    written.replace(path)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def hashed(content: Mapping[str, Any]) -> str:
    """40 hex digits over what JSON makes of ``content``."""
    encoded = json.dumps(content, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(encoded, digest_size=20, person=b"blockrag-bundle").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises BundleError naming the file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise BundleError(f"{path}: must hold a JSON object")
    return loaded


def check_keys(record: type, values: Mapping[str, Any], where: str) -> None:
    """Raises BundleError naming ``where`` unless ``values`` has the names of the dataclass ``record``'s fields."""
    names = {item.name for item in fields(record)}
    if set(values) != names:
        wrong = ", ".join(sorted(set(values) ^ names))
        raise BundleError(f"{where}: must have the keys {', '.join(sorted(names))}; wrong keys: {wrong}")


def check_listed(
    root: Path,
    listed: Mapping[str, Any],
    where: Path,
    *,
    verify_files: bool,
    sha256: Callable[[Path], str] = file_sha256,
) -> dict[str, str]:
    """Check files by their SHA-256 ``listed``, by path within ``root``; without ``verify_files`` not their content.

    ``sha256`` gives a file's. Raises BundleError naming the file, or ``where`` for a list that cannot be right.
    """
    for name, digest in listed.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise BundleError(f"{where}: file {name!r} is outside the bundle")
        if not is_sha256(digest):
            raise BundleError(f"{where}: file {name!r} has no SHA-256")
        path = root / place
        if not path.is_file():
            raise BundleError(f"{path}: missing")
        if name.endswith(".safetensors"):
            check_safetensors(path)
        if verify_files and sha256(path) != digest:
            raise BundleError(f"{path}: content differs from the manifest (SHA-256)")
    return dict(listed)


def is_sha256(value: Any) -> bool:
    """Whether ``value`` is a SHA-256 in lower-case hex."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def check_safetensors(path: Path) -> dict[str, str]:
    """Check that a file is as long as its header says, which gives the type of each tensor. Raises BundleError."""
    from safetensors import SafetensorError, safe_open  # a client, which checks no files, has none

    try:
        with safe_open(path, framework="np") as source:
            return {name: source.get_slice(name).get_dtype() for name in source.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: truncated or no safetensors file: {error}") from error
