from pathlib import Path

import pytest
import torch

from blockrag.configured import configured_bundle, configured_compute_dtype, configured_device, configured_keys
from blockrag.modeling.native import build
from blockrag.settings import BundleSettings, Settings
from tests.models import make_tiny_bundle


def _settings(**bundle: str) -> Settings:
    return Settings(bundle=BundleSettings(**bundle))


def test_a_named_device_is_taken_as_it_is() -> None:
    assert configured_device(_settings(device="cpu")) == "cpu"
    assert configured_device(_settings(device="cuda:1"), granted=False) == "cuda:1"


def test_auto_takes_a_gpu_only_where_one_was_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert configured_device(_settings()) == "cuda"
    assert configured_device(_settings(), granted=False) == "cpu"


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("avx2 avx512f avx512_bf16", "bfloat16"),
        ("avx512f amx_bf16 amx_tile", "bfloat16"),
        ("avx2 avx512f avx512_vnni", "float32"),
        (None, "float32"),
    ],
)
def test_the_type_goes_by_the_processor(
    flags: str | None, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t: avx512_bf16\n")
    monkeypatch.setattr(build, "_CPUINFO", tmp_path / "cpuinfo")
    assert configured_compute_dtype(_settings()) == dtype
    assert configured_compute_dtype(_settings(device="cuda:1")) == "bfloat16"
    assert configured_compute_dtype(_settings(compute_dtype="float32", device="cuda")) == "float32"
    assert configured_bundle(_settings(path=str(make_tiny_bundle(tmp_path / "b")))).compute_dtype == dtype


def test_weights_change_no_key(tmp_path: Path) -> None:
    path = str(make_tiny_bundle(tmp_path / "bundle"))
    found = [configured_bundle(_settings(path=path, weights=weights)) for weights in ("auto", "int8", "none")]
    assert [bundle.weights for bundle in found] == ["auto", "int8", "none"]
    assert len({bundle.fingerprint for bundle in found}) == 1


def test_the_dtypes_are_part_of_the_fingerprint_and_so_of_the_keys(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    keys = set()
    for kv_dtype in ("float32", "bfloat16"):
        settings = _settings(path=str(bundle), kv_dtype=kv_dtype)
        keys.add(configured_keys(settings, configured_bundle(settings)).block_key("public", [1, 2, 3]))
    assert len(keys) == 2
