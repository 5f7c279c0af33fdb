"""Modules and folders that can be surveyed; lists of tests that are up to date. Who may import whom: .importlinter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from blockrag.services import SERVICES
from tests.conftest import OWN_CLUSTER, SLOW

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "services" / "blockrag"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "v1")


def test_modules_are_short() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}

    assert len(lines) > 100
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_no_folder_has_ten_files_that_share_a_prefix() -> None:
    prefixes = Counter((path.parent, path.stem.split("_")[0]) for path in MODULES if path.stem != "__init__")

    assert {f"{folder}/{prefix}*": count for (folder, prefix), count in prefixes.items() if count >= 10} == {}


def test_no_two_files_of_the_services_have_one_name() -> None:
    folders = {service.name for service in SERVICES} | {"ingest", "local", "telemetry", PACKAGE.name}
    names = Counter(path.name for path in MODULES if path.parent.name in folders)
    repeated = {name for name, count in names.items() if count > 1}

    assert repeated <= {"__init__.py", "deployment.py"}


def test_what_is_marked_by_name_exists() -> None:
    for name in SLOW + OWN_CLUSTER:
        path, _, function = name.partition("::")
        assert f"def {function}" in (REPOSITORY / path).read_text(encoding="utf-8"), name
