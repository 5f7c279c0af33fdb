"""Compiling the C files beside this one, which takes a few seconds, once for each version of them.

They are for two kinds of processors (``TARGETS``), each of which has a library of its own. It is looked for beside the
sources, where ``python -m blockrag.modeling.native.build`` puts those of both kinds when an image is built, and in the
user's cache, where a process that does not find it puts it. Its name holds a hash of the sources and the options, so
that another version's library or another kind's is never loaded, and one of the compiler; where there is no compiler,
as in an image, any compiler's will do. Its SHA-256 stands in a file beside it.

And what this machine's processor can do, as Linux says.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from blockrag.modeling.cache import cache_dir, is_ours

_HERE = Path(__file__).parent
SOURCES = (_HERE / "slots.c", _HERE / "step.c", _HERE / "between.c")
_HEADERS = tuple(_HERE / f"{name}.h" for name in ("lanes", "slots", "rows", "step", "between"))
_OPTIONS = ("-O3", "-std=gnu11", "-Werror=vla", "-shared", "-fPIC", "-fopenmp")
_CPUINFO = Path("/proc/cpuinfo")
_TIMEOUT_S = 300

_logger = logging.getLogger(__name__)


class CannotBuildError(Exception):
    """There will be no library here; the message says why."""


class UntrustedLibraryError(Exception):
    """A compiled library that must not be loaded; the message says why."""


@dataclass(frozen=True)
class Target:
    """A kind of processor."""

    name: str
    flags: frozenset[str]
    """All that it must have, as Linux names them."""
    options: tuple[str, ...]
    """Of the compiler, for its instructions."""


TARGETS = (
    Target(
        "AVX-512 BF16",
        frozenset({"avx512_bf16"}),
        ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
    ),
    Target("AVX2 and FMA", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
)
"""Fastest first."""


def processor() -> Target:
    """The kind that this machine's is. Raises CannotBuildError where no library would run."""
    found = runnable()
    if not found:
        raise CannotBuildError(f"the processor has none of {', '.join(target.name for target in TARGETS)}")
    return found[0]


def runnable() -> tuple[Target, ...]:
    """Whose libraries would run here, fastest first. Raises CannotBuildError where no processor could run them."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotBuildError(f"for x86-64 under Linux only, this is {platform.machine()} under {sys.platform}")
    return tuple(target for target in TARGETS if target.flags <= _flags(_CPUINFO))


def library(target: Target, directories: tuple[Path, ...] | None = None) -> Path:
    """The library for ``target``, compiled now if none of ``directories`` has one to trust. Raises CannotBuildError."""
    directories = (_HERE, _cache()) if directories is None else directories
    contents = [path.read_bytes() for path in (*SOURCES, *_HEADERS)]
    name = f"kernels-{_digest(' '.join((*_OPTIONS, *target.options)).encode(), *contents)}"
    version = _compiler_version()
    wanted = f"{name}-*.so" if version is None else f"{name}-{_digest(version)}.so"
    for path in (path for directory in directories for path in sorted(directory.glob(wanted))):
        try:
            check_library(path)
        except UntrustedLibraryError as error:
            _logger.warning("a compiled library is left alone: %s", error)
        else:
            return path
    return build(target, directories[-1] / f"{name}-{_digest(version or b'')}.so")


def check_library(path: Path) -> None:
    """Raise UntrustedLibraryError for a library that others may have changed, or that is not what was compiled."""
    record = _record(path)
    try:
        for file in (path, record):
            if not is_ours(file):
                raise UntrustedLibraryError(f"{file} is no plain file that only this user and root may write")
        if hashlib.sha256(path.read_bytes()).hexdigest() != record.read_text(encoding="ascii").strip():
            raise UntrustedLibraryError(f"{path} is not the one whose SHA-256 {record.name} holds")
    except (OSError, UnicodeDecodeError) as error:
        raise UntrustedLibraryError(f"{path}: {error}") from error


def build(target: Target, path: Path) -> Path:
    """Compile to ``path``; whoever looks meanwhile sees all of it or nothing. Raises CannotBuildError."""
    compiler = _compiler()
    if not compiler:
        raise CannotBuildError("there is no C compiler")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [*compiler, *_OPTIONS, *target.options, "-o", str(made), *map(str, SOURCES)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if run.returncode:
                raise CannotBuildError(f"{' '.join(compiler)} failed: {run.stderr.strip()[-500:]}")
            _record(made).write_text(hashlib.sha256(made.read_bytes()).hexdigest(), encoding="ascii")
            for file, place in ((_record(made), _record(path)), (made, path)):
                file.chmod(0o644)
                file.replace(place)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuildError(str(error)) from error
    return path


def main() -> int:
    """Compile beside the source, for every kind of processor: an image may run on others than this one.

    0 also where there is nothing to compile, or nothing that would run here, so that every image builds.
    """
    try:
        here = runnable()
    except CannotBuildError as error:
        print(f"nothing to compile: {error}")
        return 0
    missed = False
    for target in TARGETS:
        try:
            print(library(target, (_HERE,)))
        except CannotBuildError as error:
            print(f"not compiled for {target.name}: {error}")
            missed = missed or target in here
    return int(missed)


def _compiler() -> list[str]:
    """The command of the C compiler; empty: there is none."""
    return (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "").split()


def _compiler_version() -> bytes | None:
    """What the compiler says of itself; None where there is none that works."""
    command = _compiler()
    if not command:
        return None
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if run.returncode else run.stdout


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _cache() -> Path:
    try:
        return cache_dir()
    except RuntimeError as error:
        raise CannotBuildError(f"no directory for the compiled library: {error}") from error


BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bfloat16, of x86-64: one of them is needed to compute in it at speed."""


def has_instructions(names: tuple[str, ...]) -> bool:
    """Whether the processor has one of ``names``; False where that cannot be read."""
    return not _flags(_CPUINFO).isdisjoint(names)


@cache
def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


if __name__ == "__main__":
    sys.exit(main())
