"""What the applications ask Ray for fits what each configuration gives Ray."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.build_app import build_app

from blockrag.settings import load_settings
from tests.unit.deploy.files import CLUSTER, KUBERNETES, NAMES, of_kind, read_yaml, rendered


@dataclass(frozen=True)
class Demand:
    """What one deployment asks for."""

    name: str
    least: int
    most: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Supply:
    """Equal nodes: how many, and what each gives."""

    least: int
    most: int
    cpus: float
    gpus: float


def demands(settings_file: Path) -> Iterator[Demand]:
    """Every deployment of the applications, as their ``build`` makes them."""
    for service in NAMES:
        application = importlib.import_module(f"blockrag.{service}.deployment").build(
            {"settings_file": str(settings_file)}
        )
        built = build_app(application, name=service, make_deployment_handle=lambda *_: None)
        for deployment in built.deployments:
            options: dict[str, Any] = deployment.ray_actor_options or {}
            scaling = deployment._deployment_config.autoscaling_config
            fixed = deployment.num_replicas or 1
            yield Demand(
                name=f"{service}.{deployment.name}",
                least=scaling.min_replicas if scaling else fixed,
                most=scaling.max_replicas if scaling else fixed,
                cpus=options.get("num_cpus", 1),
                gpus=options.get("num_gpus", 0) or 0,
            )


def shortages(supply: Supply, wanted: list[Demand]) -> list[str]:
    """What the nodes do not hold: a single replica, or all of them together."""
    found = [
        f"{demand.name} fits no node" for demand in wanted if demand.cpus > supply.cpus or demand.gpus > supply.gpus
    ]
    for nodes, count in ((supply.least, "least"), (supply.most, "most")):
        cpus = sum(getattr(demand, count) * demand.cpus for demand in wanted)
        gpus = sum(getattr(demand, count) * demand.gpus for demand in wanted)
        if cpus > nodes * supply.cpus:
            found.append(f"{count} replicas: {cpus} CPUs asked for")
        if gpus > nodes * supply.gpus + 1e-9:
            found.append(f"{count} replicas: {gpus} GPUs asked for")
    return found


@pytest.mark.parametrize(("name", "gpus"), [("local", 0), ("gpu-node", 1)])
def test_a_single_machine_holds_all_replicas(name: str, gpus: int) -> None:
    settings_file = CLUSTER / "settings" / f"{name}.yaml"
    cpus = load_settings(settings_file, environment={}).cluster.num_cpus

    assert shortages(Supply(1, 1, cpus, gpus), list(demands(settings_file))) == []


def test_the_machines_of_ray_up_hold_all_replicas() -> None:
    settings_file = CLUSTER / "settings" / "cluster.yaml"
    machines = len(read_yaml(CLUSTER / "ray-up.yaml")["provider"]["worker_ips"])
    cpus = load_settings(settings_file, environment={}).cluster.num_cpus

    assert shortages(Supply(machines, machines, cpus, 0), list(demands(settings_file))) == []


@pytest.mark.parametrize("folder", ["base", "overlays/local", "overlays/gpu"])
def test_the_worker_group_holds_all_replicas(folder: str, tmp_path: Path) -> None:
    documents = rendered(KUBERNETES / folder)
    (group,) = of_kind(documents, "RayService")[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    settings_file = tmp_path / "settings.yaml"
    maps = [item["data"] for item in of_kind(documents, "ConfigMap")]
    settings_file.write_text(next(data["settings.yaml"] for data in maps if "settings.yaml" in data), encoding="utf-8")
    parameters = group["rayStartParams"]
    supply = Supply(
        group["minReplicas"], group["maxReplicas"], int(parameters["num-cpus"]), int(parameters.get("num-gpus", 0))
    )

    assert shortages(supply, list(demands(settings_file))) == []
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_too_small_a_supply_is_noticed() -> None:
    wanted = [Demand("encoder.Encoder", 1, 4, 2, 0)]

    assert shortages(Supply(1, 1, 8, 0), wanted) == []
    assert shortages(Supply(1, 1, 6, 0), wanted) == ["most replicas: 8 CPUs asked for"]
    assert shortages(Supply(8, 8, 1, 0), wanted) == ["encoder.Encoder fits no node"]
