"""Where and with what a number was measured: part of every result that is written down."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blockrag import __version__


@dataclass(frozen=True)
class Environment:
    """Commit, versions and hardware of a measurement."""

    commit: str
    """Git commit of the source tree, with "+" when it had changes; empty outside of a tree."""
    blockrag: str
    """Version of the package."""
    date: str
    """ISO 8601, UTC."""
    cpu: str
    cores: int
    memory_gib: float
    python: str
    torch: str
    transformers: str
    device: str

    @property
    def source(self) -> str:
        """The code that was measured: the commit, outside of a tree the package's version."""
        return f"commit {self.commit}" if self.commit else f"blockrag {self.blockrag}"


def describe_environment(device: str = "cpu") -> Environment:
    """The environment of the calling process."""
    import torch
    import transformers

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return Environment(
        commit=_commit(),
        blockrag=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(pages / 2**30, 1),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=name,
    )


def _commit() -> str:
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed package may lie inside of somebody else's tree, whose commit says nothing about it.
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
        if tracked.returncode:
            return ""
        # --dirty marks changes of tracked files.
        describe = [*git, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        result = subprocess.run(describe, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
