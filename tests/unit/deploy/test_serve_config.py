"""``cluster/*.yaml`` say what Serve understands and what the settings say."""

from __future__ import annotations

import importlib
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import LoggingConfig, ServeDeploySchema

from blockrag.errors import SettingsError
from blockrag.services import GRPC_SERVICER_FUNCTION, with_applications
from blockrag.settings import Settings, load_settings
from tests.unit.deploy.files import CLUSTER, KUBERNETES, NAMES, REPOSITORY, SERVE_CONFIGS, read_yaml, serve_config


def unknown_keys(model: type[BaseModel], data: dict[str, Any], where: str = "") -> list[str]:
    """Keys that the model does not have, at any depth: Serve itself ignores them."""
    names = {field.alias or name: field for name, field in model.model_fields.items()}
    found = [f"{where}{key}" for key in data if key not in names]
    for key in data.keys() & names.keys():
        nested = _model_of(names[key].annotation)
        values = data[key] if isinstance(data[key], list) else [data[key]]
        for value in values:
            if nested is not None and isinstance(value, dict):
                found += unknown_keys(nested, value, f"{where}{key}.")
    return found


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    # logging_config is declared as a plain dict in an application and as this model elsewhere.
    found = [_model_of(argument) for argument in typing.get_args(annotation)]
    return next((model for model in found if model is not None), None)


def settings_of(name: str) -> Settings:
    return load_settings(CLUSTER / "settings" / f"{name}.yaml", environment={})


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_serve_accepts_it_and_knows_every_key(name: str) -> None:
    config = serve_config(name)

    parsed = ServeDeploySchema.model_validate(config)

    assert unknown_keys(ServeDeploySchema, config) == []
    assert unknown_keys(LoggingConfig, config["logging_config"]) == []
    assert [application.name for application in parsed.applications] == list(NAMES)


@pytest.mark.parametrize(
    "path", [*(CLUSTER / f"{name}.yaml" for name in SERVE_CONFIGS), KUBERNETES / "base" / "rayservice.yaml"], ids=str
)
def test_the_registry_writes_its_applications(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert with_applications(text) == text
    assert with_applications(text.replace("- name: decoder", "- name: forgotten")) == text


def test_a_misspelled_key_is_found() -> None:
    config = serve_config("local")
    config["applications"][0]["deployments"] = [{"name": "Encoder", "num_replcias": 2}]

    assert unknown_keys(ServeDeploySchema, config) == ["applications.deployments.num_replcias"]


def test_serve_builds_every_application_from_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for application in serve_config("local")["applications"]:
        build = importlib.import_module(application["import_path"].partition(":")[0]).build

        assert isinstance(call_user_app_builder_with_args_if_necessary(build, application["args"]), Application)
        with pytest.raises(SettingsError, match="setings_file"):
            call_user_app_builder_with_args_if_necessary(build, {"setings_file": "x"})
        with pytest.raises(SettingsError, match=r"nowhere\.yaml"):
            call_user_app_builder_with_args_if_necessary(build, {"settings_file": "nowhere.yaml"})


@pytest.mark.parametrize("name", ["local", "gpu-node"])
def test_the_settings_file_of_a_single_machine_is_in_the_repository(name: str) -> None:
    settings_file = serve_config(name)["applications"][0]["args"]["settings_file"]

    assert REPOSITORY / settings_file == CLUSTER / "settings" / f"{name}.yaml"


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_grpc_serves_every_service(name: str) -> None:
    functions = serve_config(name)["grpc_options"]["grpc_servicer_functions"]

    assert functions == [GRPC_SERVICER_FUNCTION]
    for function in functions:
        module, attribute = function.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_ports_and_hosts_are_those_of_the_settings(name: str) -> None:
    config, cluster = serve_config(name), settings_of(name).cluster

    assert (config["http_options"]["host"], config["http_options"]["port"]) == (cluster.host, cluster.http_port)
    assert config["grpc_options"]["port"] == cluster.grpc_port


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_settings_are_consistent(name: str) -> None:
    settings = settings_of(name)

    assert settings.cluster.object_store_mb >= 1.5 * settings.kv_cache.budget_mb
    if settings.retriever.replicas > 1:
        assert settings.retriever.backend == "server"
    assert settings.cluster.host == "127.0.0.1" or name == "cluster"


@pytest.mark.parametrize("name", ["local", "gpu-node"])
def test_the_commands_in_the_header_start_ray_as_the_settings_say(name: str) -> None:
    header = (CLUSTER / f"{name}.yaml").read_text(encoding="utf-8").split("proxy_location")[0]
    cluster = settings_of(name).cluster

    assert f"--num-cpus={cluster.num_cpus} " in header
    assert f"--object-store-memory={cluster.object_store_mb * 2**20}\n" in header
    assert f"serve deploy cluster/{name}.yaml" in header


def test_ray_up_reads_its_file() -> None:
    config = read_yaml(CLUSTER / "ray-up.yaml")
    cluster = settings_of("cluster").cluster
    workers = config["worker_start_ray_commands"][-1]

    validate_config(prepare_config(config))

    assert f"--num-cpus={cluster.num_cpus} " in workers
    assert f"--object-store-memory={cluster.object_store_mb * 2**20}" in workers
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
