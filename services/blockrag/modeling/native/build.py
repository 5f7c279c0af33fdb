"""Compiling the C files beside this one, which takes two seconds, once for each version of them.

The library is looked for beside the sources, where ``python -m blockrag.modeling.native.build`` puts it when an image
is built, and in the user's cache, where a process that does not find it puts it. Its name holds a hash of the sources
and the compiler's options, so that another version's library is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from blockrag.modeling.cache import cache_dir

_HERE = Path(__file__).parent
SOURCES = (_HERE / "slots.c",)
_OPTIONS = (
    *("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp"),
    *("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
)
_TIMEOUT_S = 60


class CannotBuildError(Exception):
    """There will be no library here; the message says why."""


def check_processor() -> None:
    """Raise CannotBuildError where the library would not run."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotBuildError(f"for x86-64 under Linux only, this is {platform.machine()} under {sys.platform}")
    if " avx512_bf16 " not in Path("/proc/cpuinfo").read_text(encoding="utf-8").replace("\n", " "):
        raise CannotBuildError("the processor has no AVX-512 BF16")


def library(directories: tuple[Path, ...] | None = None) -> Path:
    """The compiled library, compiled now if none of ``directories`` has it. Raises CannotBuildError."""
    directories = (_HERE, _cache()) if directories is None else directories
    digest = hashlib.sha256(" ".join(_OPTIONS).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    paths = [directory / f"kernels-{digest.hexdigest()[:16]}.so" for directory in directories]
    found = next((path for path in paths if path.is_file()), None)
    return found or build(paths[-1])


def build(path: Path) -> Path:
    """Compile to ``path``; whoever looks meanwhile sees all of it or nothing. Raises CannotBuildError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise CannotBuildError("there is no C compiler")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [*compiler.split(), *_OPTIONS, "-o", str(made), *map(str, SOURCES)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if run.returncode:
                raise CannotBuildError(f"{compiler} failed: {run.stderr.strip()[-500:]}")
            made.replace(path)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuildError(str(error)) from error
    return path


def _cache() -> Path:
    try:
        return cache_dir()
    except RuntimeError as error:
        raise CannotBuildError(f"no directory for the compiled library: {error}") from error


if __name__ == "__main__":
    print(library((_HERE,)))
