"""``blockrag demo`` in the running system: what it shows of two questions and a document, from first ingest to table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.local import LocalSystem
from tests.integration.conftest import Cluster


@pytest.mark.timeout(600)
def test_the_demo(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def running(*_: Any, **__: Any) -> Iterator[LocalSystem]:
        yield cluster.system

    started = running()
    started.target = cluster.target  # type: ignore[attr-defined]
    monkeypatch.setattr(LocalSystem, "start", lambda *_, **__: started)
    (tmp_path / "mill.txt").write_text("The mill of Arle has three wheels.", encoding="utf-8")

    result = CliRunner().invoke(
        app, ["demo", "--questions", "2", "--document", str(tmp_path / "mill.txt"), "--json"], catch_exceptions=False
    )

    assert result.exit_code == 0, result.output
