"""In which type a training computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.modeling.native import build
from blockrag.training.configuring import in_bfloat16


@pytest.mark.parametrize(("flags", "fast"), [("avx2 fma", False), ("avx2 avx512_bf16", True), ("amx_bf16", True)])
def test_auto_is_bfloat16_where_its_products_are_fast(
    flags: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(build, "_CPUINFO", cpuinfo)
    assert in_bfloat16("auto", "cpu") is fast
    assert in_bfloat16("auto", "cuda")
    assert in_bfloat16("bf16", "cpu")
    assert not in_bfloat16("fp32", "cuda")
