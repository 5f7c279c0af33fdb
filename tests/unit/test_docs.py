"""What the documents say of the source exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "services" / "blockrag"
PLACES = re.findall(r"`([\w/]+\.py):([\w.]+)`", (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_the_architecture_names_functions_that_exist(file: str, name: str) -> None:
    body: list[ast.stmt] = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == part
        ]
        assert found, f"{file} has no {name}"
        body = found[0].body


def test_each_step_of_a_question_is_named() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d\. .*$", text, re.M)

    assert len(steps) == 8
    assert all(re.search(r"`[\w/]+\.py:[\w.]+`", step) for step in steps)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md")),
    ],
)
def test_links_lead_somewhere(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]

    assert [link for link in links if not ((REPOSITORY / document).parent / link).exists()] == []
