"""The deployment's files, read and rendered as their tools read and render them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockrag.services import SERVICES

REPOSITORY = Path(__file__).resolve().parents[3]
CLUSTER = REPOSITORY / "cluster"
KUBERNETES = REPOSITORY / "k8s"
SERVE_CONFIGS = ("local", "gpu-node", "cluster")
NAMES = tuple(service.name for service in SERVICES)


def serve_config(name: str) -> dict[str, Any]:
    """One of ``cluster/*.yaml``."""
    return read_yaml(CLUSTER / f"{name}.yaml")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@functools.cache
def rendered(folder: Path) -> tuple[dict[str, Any], ...]:
    """What ``kubectl apply -k FOLDER`` would send."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: kustomize folders cannot be rendered")
    result = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return tuple(yaml.safe_load_all(result.stdout))


def of_kind(documents: tuple[dict[str, Any], ...], kind: str) -> list[dict[str, Any]]:
    """The rendered objects of one kind."""
    return [document for document in documents if document["kind"] == kind]


def bytes_of(quantity: str) -> int:
    """Bytes of a Kubernetes quantity such as 4608Mi."""
    for suffix, factor in (("Gi", 2**30), ("Mi", 2**20)):
        if quantity.endswith(suffix):
            return int(quantity.removesuffix(suffix)) * factor
    return int(quantity)
