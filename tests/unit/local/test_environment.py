from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.local.local_system import _supervisor_environment
from blockrag.settings import load_settings


def test_services_share_the_cache_directory_and_take_no_settings_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKRAG_CACHE", "/somewhere")
    monkeypatch.setenv("BLOCKRAG_CLUSTER__STATE_DIR", str(tmp_path))

    environment = _supervisor_environment(load_settings())

    assert {name: value for name, value in environment.items() if name.startswith("BLOCKRAG_")} == {
        "BLOCKRAG_CACHE": "/somewhere"
    }
