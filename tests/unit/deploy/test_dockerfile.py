"""The Dockerfile agrees with the package, the settings and the pods; the image itself is not built here."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from blockrag.local.local_system import SERVICE_ENVIRONMENT
from blockrag.settings import ENVIRONMENT_PREFIX
from tests.unit.deploy.files import REPOSITORY, of_kind, rendered

TEXT = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def arguments(instruction: str) -> list[str]:
    """What follows an instruction, wherever it stands."""
    return re.findall(rf"^{instruction} +(.*?) *$", TEXT, re.MULTILINE)


def test_python_is_one_that_the_package_supports() -> None:
    (found,) = {re.fullmatch(r"python:(3\.\d+)-slim-\w+", image.split()[0])[1] for image in arguments("FROM")}  # type: ignore[index]

    assert PROJECT["requires-python"] == f">={found}"


def test_everything_that_is_copied_exists_and_is_not_ignored() -> None:
    rules = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copies = [words.split() for words in arguments("COPY") if not words.startswith("--from")]
    sources = {source for words in copies for source in words[:-1]}

    assert "*" in rules
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []


def test_the_line_of_python_lists_the_dependencies(tmp_path: Path) -> None:
    (command,) = (command for command in arguments("RUN") if "tomllib" in command)
    (tmp_path / "python").symlink_to(Path(sys.executable))

    result = subprocess.run(
        ["sh", "-c", command.split(">")[0].strip().replace("python", str(tmp_path / "python"), 1)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout.splitlines() == [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]]


def test_the_image_runs_as_the_user_of_the_pods() -> None:
    (service,) = of_kind(rendered(REPOSITORY / "k8s" / "base"), "RayService")
    pod = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["securityContext"]

    assert arguments("USER") == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]


def test_the_environment_is_that_of_a_service_and_no_setting() -> None:
    pairs = [pair.partition("=") for line in arguments("ENV") for pair in line.split()]
    environment = {name: value for name, _, value in pairs}

    assert environment.items() >= SERVICE_ENVIRONMENT.items()
    assert not [name for name in environment if name.startswith(ENVIRONMENT_PREFIX)]
