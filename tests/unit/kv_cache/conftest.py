from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty volume: one that puts objects, one that renames files."""
    (tmp_path / "volume").mkdir()
    return f"{request.param}://{tmp_path}/volume"
