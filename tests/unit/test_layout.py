"""Who may import what: the rules of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "services"
PACKAGE = SOURCE / "blockrag"
SERVICES = ("gateway", "retriever", "encoder", "kv_cache", "compressor", "decoder")
FRAMEWORKS = {"ray", "pydantic", "grpc"}

# Models and training run on a GPU machine that has torch and transformers only; so does the decoder's engine.
FRAMEWORK_FREE = sorted(
    [*PACKAGE.glob("modeling/**/*.py"), *PACKAGE.glob("training/**/*.py"), PACKAGE / "decoder" / "engine.py"]
)

# Ray belongs into a service's deployment.py. health.py runs in Serve's proxies and asks Serve what is healthy.
# The cache's shards own Ray's objects, and other services reach them through handles.
RAY_ALLOWED = (
    {PACKAGE / "gateway" / "health.py"}
    | {PACKAGE / name / "deployment.py" for name in SERVICES}
    | {PACKAGE / "kv_cache" / name for name in ("shard_actor.py", "remote.py", "objects.py")}
)


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(name: str) -> Path | None:
    path = SOURCE / Path(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules named by the file's import statements, those within functions and names of ``from`` included."""
    return frozenset(_imports(ast.parse(path.read_text(encoding="utf-8"))))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def external(path: Path) -> set[str]:
    """Top-level packages that the file imports itself."""
    return {name.split(".")[0] for name in imports(path)} - {"blockrag"}


def reached(path: Path) -> dict[str, list[str]]:
    """Packages imported by the file or by modules of ours that it imports, each with the way there."""
    found: dict[str, list[str]] = {}
    ways = {path: [module_name(path)]}
    pending = [path]
    while pending:
        current = pending.pop()
        for package in external(current):
            found.setdefault(package, ways[current])
        for name in imports(current):
            file = module_file(name) if name.startswith("blockrag") else None
            if file is not None and file not in ways:
                ways[file] = [*ways[current], name]
                pending.append(file)
    return found


def all_modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "v1")


@pytest.mark.parametrize("path", FRAMEWORK_FREE, ids=module_name)
def test_models_engine_and_training_know_no_framework(path: Path) -> None:
    ways = {package: " -> ".join(way) for package, way in reached(path).items() if package in FRAMEWORKS}

    assert ways == {}


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_deployment_of_a_service_imports_ray(service: str) -> None:
    importing = {path for path in (PACKAGE / service).rglob("*.py") if "ray" in external(path)}

    assert importing <= RAY_ALLOWED
    assert PACKAGE / service / "deployment.py" in importing


def test_only_deployments_import_deployments() -> None:
    for path in all_modules():
        if path.name != "deployment.py":
            deployments = {name for name in imports(path) if name.endswith(".deployment")}
            assert deployments == set(), f"{module_name(path)} would pull in Ray"


def test_the_shared_nouns_import_nothing_of_ours() -> None:
    assert {name for name in imports(PACKAGE / "types.py") if name.startswith("blockrag")} == set()
    assert {name for name in imports(PACKAGE / "errors.py") if name.startswith("blockrag")} == set()


def test_packages_have_no_import_that_tests_would_need() -> None:
    for path in all_modules():
        assert external(path).isdisjoint({"pytest", "hypothesis", "locust", "tests", "load_tests"}), module_name(path)


def test_adapters_are_served_without_peft() -> None:
    for path in all_modules():
        if not path.is_relative_to(PACKAGE / "training"):
            assert external(path).isdisjoint({"peft", "accelerate"}), module_name(path)


def test_modules_are_short() -> None:
    long = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in all_modules()}

    assert {name: lines for name, lines in long.items() if lines > 400} == {}


class TestTheCheckItself:
    def test_imports_within_functions_and_of_submodules_count(self, tmp_path: Path) -> None:
        file = tmp_path / "module.py"
        file.write_text("import a.b\nfrom c import d\ndef f():\n    from ray import serve\n", encoding="utf-8")

        assert imports(file) == {"a.b", "c", "c.d", "ray", "ray.serve"}
        assert external(file) == {"a", "c", "ray"}

    def test_the_way_to_a_framework_is_told(self) -> None:
        ways = reached(PACKAGE / "compressor" / "deployment.py")

        assert ways["ray"] == ["blockrag.compressor.deployment"]
        assert ways["pydantic"][-1] == "blockrag.settings"
