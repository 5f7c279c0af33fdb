"""What this machine's processor can do, as Linux says."""

from __future__ import annotations

from functools import cache
from pathlib import Path

BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bfloat16, of x86-64: one of them is needed to compute in it at speed."""
_CPUINFO = Path("/proc/cpuinfo")


def has_instructions(names: tuple[str, ...], cpuinfo: Path | None = None) -> bool:
    """Whether the processor has one of ``names``; False where that cannot be read."""
    return not _flags(cpuinfo or _CPUINFO).isdisjoint(names)


@cache
def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))
