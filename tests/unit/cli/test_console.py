"""What goes into a file or a pipe is not cut at a terminal's 80 columns; whom commands ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blockrag.access import hashed_key
from blockrag.cli.console import Connection
from blockrag.local.state import own_state, write_state
from blockrag.settings import GatewaySettings, KvCacheSettings, Settings
from blockrag.tenants import TenantSettings

_PROGRAM = """
from rich.table import Table
from blockrag.cli import console
table = Table(*(f"column {number}" for number in range(10)))
table.add_row(*(["123,456.7"] * 10))
console.out.print(table)
"""


@pytest.mark.parametrize(("columns", "found"), [("", 10), ("60", 0)])
def test_a_piped_table_keeps_its_numbers(columns: str, found: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"COLUMNS": columns} if columns else {}
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("123,456.7") == found


TENANT = TenantSettings(name="acme", api_keys=(hashed_key("another-key-of-acme"), "acme-key-0123456789"))


def test_a_command_has_the_key_of_the_system_that_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``blockrag up --settings my.yaml``, which later commands need not name."""
    running = Settings(
        gateway=GatewaySettings(tenants=(TENANT,)), kv_cache=KvCacheSettings(secret="a secret of this test")
    )
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(running.model_dump(mode="json")))
    write_state(tmp_path, own_state("127.0.0.1:1").with_phase("ready"))
    monkeypatch.setenv("BLOCKRAG_CLUSTER__STATE_DIR", str(tmp_path))

    assert dict(Connection().client()._metadata)["authorization"] == "Bearer acme-key-0123456789"
    assert dict(Connection(api_key="typed").client()._metadata)["authorization"] == "Bearer typed"
    (tmp_path / "settings.yaml").write_text("a_section_of_another_version: {}")
    assert "authorization" not in dict(Connection().client()._metadata)
