"""What is installed by which door: the client alone, the system, adaptation and measuring."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Lets through what the client's dependencies bring (and what these import), and nothing else that is installed.
CLIENT_ONLY = """
import sys
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement

def closure(names):
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for line in requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    return found

allowed = closure(sys.argv[1].split(",")) | {"blockrag"}
hidden = {module for module, owners in packages_distributions().items()
          if not any(owner.lower().replace("_", "-") in allowed for owner in owners)}

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
assert "torch" in hidden and "ray" in hidden and "numpy" in hidden
"""


def client_only(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where only the client's dependencies can be imported."""
    names = ",".join(line.replace("<", ">").partition(">")[0].strip() for line in PROJECT["dependencies"])
    return subprocess.run(
        [sys.executable, "-c", CLIENT_ONLY + code, names], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_client_and_its_commands_need_the_client_s_packages_only() -> None:
    result = client_only("import blockrag.client, blockrag.cli.main; print(len(hidden) > 50)")

    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


@pytest.mark.parametrize("command", ["up", "doctor", "bundle verify", "bench ttft --no-grpc"])
def test_a_command_of_another_door_says_what_to_install(command: str) -> None:
    result = client_only(f"sys.argv = {['blockrag', *command.split()]!r}; from blockrag.cli.main import main; main()")

    assert result.returncode == 1
    assert "pip install 'blockrag[serve]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_who_starts_the_system_loads_no_model() -> None:
    """It builds the applications, for which it imports them; what computes comes with the replicas."""
    code = """
import sys
from pkgutil import resolve_name
import blockrag.local.supervisor
from blockrag.services import SERVICES
for service in SERVICES:
    resolve_name(service.import_path)({"settings_file": ""})
print(sorted({"torch", "transformers", "qdrant_client"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_what_is_reached_into_privately_has_an_upper_bound() -> None:
    lines = [line for extra in ("serve", "adapt") for line in PROJECT["optional-dependencies"][extra]]
    lines += PROJECT["dependencies"]
    for name in ("ray", "torch", "transformers", "grpcio"):
        bounds = [line for line in lines if line.partition(">")[0].partition("[")[0] == name]
        assert bounds and all("<" in line for line in bounds), name


def test_types_and_licence_are_shipped() -> None:
    assert (REPOSITORY / "services" / "blockrag" / "py.typed").is_file()
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
