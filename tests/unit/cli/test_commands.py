import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.local.preflight import free_port

_PROMISED = ["up", "down", "status", "ingest", "ask", "delete", "warm", "bench", "bundle", "adapt", "eval", "demo"]


def _commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    waiting = [((), get_command(app))]
    while waiting:
        path, command = waiting.pop()
        children = getattr(command, "commands", {})
        found.append(path) if not children else waiting.extend(
            ((*path, name), child) for name, child in children.items()
        )
    return sorted(found)


def test_every_promised_command_is_there() -> None:
    assert {path[0] for path in _commands()} >= set(_PROMISED)


@pytest.mark.parametrize("path", _commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"blockrag {' '.join(path)}" in result.output.split("xample", 1)[1]


@pytest.mark.parametrize("path", _commands(), ids=" ".join)
def test_every_command_can_print_json(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert "--json" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "nothing is running: start it with 'blockrag up'"),
        (["ask", "What?", "--filter", "nonsense"], "write key=value"),
        (["ask", "What?", "--target", "127.0.0.1:1", "--rate", "2", "--max-ttft-ms", "9"], "needs one of rate"),
        (["ask", "What?", "--target", "127.0.0.1:1", "--policy", "query"], "needs one of rate"),
        (["ingest"], "give files or directories, or --almanac"),
        (["ingest", "/no/such/file"], "does not exist"),
        (["delete"], "give documents, or --source, or --all"),
        (["bundle", "show", "/no/such/bundle"], "no such directory"),
        (["up", "--settings", "/no/such/settings.yaml"], "settings.yaml"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKRAG_CLUSTER__STATE_DIR", str(tmp_path))
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_down_without_a_system_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKRAG_CLUSTER__STATE_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["down", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"stopped": False}


def test_an_address_where_nothing_listens_is_named() -> None:
    target = f"127.0.0.1:{free_port()}"
    result = CliRunner().invoke(app, ["ask", "What?", "--target", target, "--timeout", "5"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "error: Unavailable" in result.output


def test_help_is_fast_because_it_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from blockrag.cli.main import app; "
        "print([name for name in ('ray', 'torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
