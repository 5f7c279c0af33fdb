"""What goes into a file or a pipe is not cut at a terminal's 80 columns."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
