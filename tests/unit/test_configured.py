from pathlib import Path

import pytest
import torch

from blockrag.configured import configured_bundle, configured_device, configured_keys
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


def test_the_dtypes_are_part_of_the_fingerprint_and_so_of_the_keys(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    keys = set()
    for kv_dtype in ("float32", "bfloat16"):
        settings = _settings(path=str(bundle), kv_dtype=kv_dtype)
        keys.add(configured_keys(settings, configured_bundle(settings)).block_key("public", [1, 2, 3]))
    assert len(keys) == 2
