"""``k8s/`` renders to what Kubernetes and KubeRay accept, and agrees with ``cluster/`` and the settings."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import blockrag
from blockrag.settings import Settings, load_settings
from tests.unit.deploy.files import CLUSTER, KUBERNETES, REPOSITORY, bytes_of, of_kind, rendered

FOLDERS = {
    "base": KUBERNETES / "base",
    "local": KUBERNETES / "overlays" / "local",
    "gpu": KUBERNETES / "overlays" / "gpu",
}
SCHEMA = REPOSITORY / "tests" / "data" / "rayservice-v1.schema.json.gz"
"""Of RayService v1, from KubeRay's custom resource definition (Apache 2.0): its ``openAPIV3Schema``."""
KUBERNETES_VERSION = "1.31"
_OTHERS = ("monitoring.coreos.com/", "gateway.networking.k8s.io/")
"""APIs whose definitions are not here: promtool reads the rules, routes have a test of their own."""

Document = dict[str, Any]


@pytest.fixture(params=list(FOLDERS))
def documents(request: pytest.FixtureRequest) -> tuple[Document, ...]:
    return rendered(FOLDERS[request.param])


@pytest.fixture
def ray_service(documents: tuple[Document, ...]) -> Document:
    return only(of_kind(documents, "RayService"))


@pytest.fixture
def settings(documents: tuple[Document, ...], tmp_path: Path) -> Settings:
    return load_settings(written_settings(documents, tmp_path), environment={})


@pytest.fixture(scope="session")
def strict_schema() -> Document:
    schema: Document = strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    return schema


def only(items: list[Any]) -> Any:
    assert len(items) == 1
    return items[0]


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused; the API server drops them silently."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def written_settings(documents: tuple[Document, ...], folder: Path) -> Path:
    path = folder / "settings.yaml"
    path.write_text(settings_map(documents)["data"]["settings.yaml"], encoding="utf-8")
    return path


def settings_map(documents: tuple[Document, ...]) -> Document:
    maps = of_kind(documents, "ConfigMap")
    found: Document = only([item for item in maps if item["metadata"]["name"].startswith("blockrag-settings-")])
    return found


def pod_templates(ray_service: Document) -> dict[str, Document]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def worker_group(ray_service: Document) -> Document:
    group: Document = only(ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"])
    return group


def all_pod_specs(documents: tuple[Document, ...]) -> list[Document]:
    specs = [
        template["spec"] for service in of_kind(documents, "RayService") for template in pod_templates(service).values()
    ]
    owners = of_kind(documents, "StatefulSet") + of_kind(documents, "Deployment")
    return specs + [owner["spec"]["template"]["spec"] for owner in owners]


def shared_memory(template: Document) -> int:
    volume = only([item for item in template["spec"]["volumes"] if item["name"] == "shared-memory"])
    assert volume["emptyDir"]["medium"] == "Memory"
    return bytes_of(volume["emptyDir"]["sizeLimit"])


def refusal(document: Document) -> str | None:
    """Why Kubernetes would refuse a document of a core kind."""
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return None


class TestAcceptedByKubernetes:
    def test_ray_service_fits_the_strict_schema(self, ray_service: Document, strict_schema: Document) -> None:
        assert list(jsonschema.Draft202012Validator(strict_schema).iter_errors(ray_service)) == []

    def test_the_strict_schema_refuses_a_misspelled_key(self, strict_schema: Document) -> None:
        document = copy.deepcopy(only(of_kind(rendered(FOLDERS["base"]), "RayService")))
        document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["restartPolice"] = ""

        with pytest.raises(jsonschema.ValidationError, match="restartPolice"):
            jsonschema.Draft202012Validator(strict_schema).validate(document)

    def test_core_kinds_and_the_pods_of_the_ray_service_are_valid(
        self, documents: tuple[Document, ...], ray_service: Document
    ) -> None:
        pods = [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
            for name, template in pod_templates(ray_service).items()
        ]
        core = [document for document in documents if document["kind"] != "RayService"]

        assert [found for document in core + pods if (found := refusal(document))] == []


class TestServeConfiguration:
    def test_it_is_the_clusters_word_for_word(self, ray_service: Document) -> None:
        embedded = ray_service["spec"]["serveConfigV2"]

        assert embedded == (CLUSTER / "cluster.yaml").read_text(encoding="utf-8")

    def test_settings_are_mounted_where_it_reads_them(
        self, documents: tuple[Document, ...], ray_service: Document
    ) -> None:
        config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
        expected = {application["args"]["settings_file"] for application in config["applications"]}

        for template in pod_templates(ray_service).values():
            volume = only([item for item in template["spec"]["volumes"] if "configMap" in item])
            mounts = template["spec"]["containers"][0]["volumeMounts"]
            mount = only([item for item in mounts if item["name"] == volume["name"]])
            assert volume["configMap"]["name"] == settings_map(documents)["metadata"]["name"]
            assert {f"{mount['mountPath']}/settings.yaml"} == expected

    def test_the_bases_settings_are_the_clusters(self) -> None:
        copied = KUBERNETES / "base" / "settings.yaml"

        assert copied.read_text(encoding="utf-8") == (CLUSTER / "settings" / "cluster.yaml").read_text(encoding="utf-8")

    def test_ports_are_those_of_the_settings(self, ray_service: Document, settings: Settings) -> None:
        expected = {"serve": settings.cluster.http_port, "serve-grpc": settings.cluster.grpc_port}

        for template in pod_templates(ray_service).values():
            ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            assert expected.items() <= ports.items()
        service_ports = ray_service["spec"]["serveService"]["spec"]["ports"]
        assert {port["name"]: port["port"] for port in service_ports} == expected
        probe = worker_group(ray_service)["template"]["spec"]["containers"][0]["readinessProbe"]
        assert f"http://localhost:{settings.cluster.http_port}/-/healthz" in probe["exec"]["command"][-1]


class TestSizes:
    def test_ray_is_started_as_the_settings_say(self, ray_service: Document, settings: Settings) -> None:
        parameters = worker_group(ray_service)["rayStartParams"]

        assert int(parameters["num-cpus"]) == settings.cluster.num_cpus
        assert int(parameters["object-store-memory"]) == settings.cluster.object_store_mb * 2**20

    def test_the_object_store_fits_shared_memory(self, ray_service: Document) -> None:
        cluster = ray_service["spec"]["rayClusterConfig"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            store = int(group["rayStartParams"]["object-store-memory"])
            assert shared_memory(group["template"]) >= 1.05 * store

    def test_the_cache_fits_one_workers_object_store(self, settings: Settings) -> None:
        # Every encoder may run on the same worker, and a block lives where it was encoded.
        assert settings.cluster.object_store_mb >= 1.5 * settings.kv_cache.budget_mb

    def test_memory_holds_shared_memory_and_the_decoders_blocks(
        self, ray_service: Document, settings: Settings
    ) -> None:
        template = worker_group(ray_service)["template"]
        memory = bytes_of(template["spec"]["containers"][0]["resources"]["limits"]["memory"])

        decoders = settings.decoder.replicas * settings.decoder.l1_mb * 2**20
        assert memory >= shared_memory(template) + decoders + 2**30

    def test_gpus_go_with_gpu_settings(self, ray_service: Document, settings: Settings) -> None:
        group = worker_group(ray_service)
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        wants_gpu = settings.decoder.num_gpus > 0

        assert ("nvidia.com/gpu" in limits) == wants_gpu
        assert group["rayStartParams"].get("num-gpus") == limits.get("nvidia.com/gpu")
        assert ("tolerations" in group["template"]["spec"]) == wants_gpu
        assert settings.bundle.compute_dtype == ("bfloat16" if wants_gpu else "auto")


class TestSecretsAndVariables:
    def test_pods_have_no_service_variables(self, documents: tuple[Document, ...]) -> None:
        # BLOCKRAG_SERVE_SVC_PORT and the like would be refused as unknown settings.
        assert all(spec["enableServiceLinks"] is False for spec in all_pod_specs(documents))

    def test_blockrag_variables_are_settings(self, ray_service: Document) -> None:
        values = {
            "BLOCKRAG_KV_CACHE__SECRET": "a secret of the cache",
            "BLOCKRAG_RETRIEVER__API_KEY": "a key",
            "BLOCKRAG_GATEWAY__TENANTS": '[{"name": "acme", "api_key": "0123456789abcdef"}]',
        }
        for template in pod_templates(ray_service).values():
            names = {item["name"] for item in template["spec"]["containers"][0]["env"]}
            assert names == values.keys()
        loaded = load_settings(None, environment=values)
        assert loaded.gateway.tenants[0].name == "acme"

    def test_secrets_come_from_a_secret(self, documents: tuple[Document, ...]) -> None:
        for spec in all_pod_specs(documents):
            for variable in spec["containers"][0]["env"]:
                if re.search("KEY|SECRET|TENANTS", variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "blockrag-secrets"

    def test_the_local_secret_has_every_key(self) -> None:
        documents = rendered(FOLDERS["local"])
        secret = only(of_kind(documents, "Secret"))
        references = {
            variable["valueFrom"]["secretKeyRef"]["key"]
            for spec in all_pod_specs(documents)
            for variable in spec["containers"][0]["env"]
            if "valueFrom" in variable
        }

        assert secret["metadata"]["name"] == "blockrag-secrets"
        assert secret["data"].keys() == references

    def test_network_policies_select_pods_that_exist(
        self, documents: tuple[Document, ...], ray_service: Document
    ) -> None:
        templates = list(pod_templates(ray_service).values())
        templates += [item["spec"]["template"] for item in of_kind(documents, "StatefulSet")]
        labels = [template["metadata"]["labels"] for template in templates]

        for policy in of_kind(documents, "NetworkPolicy"):
            selector = policy["spec"]["podSelector"]["matchLabels"]
            assert any(selector.items() <= found.items() for found in labels)


class TestVersions:
    def test_ray_is_the_one_that_is_installed(self, ray_service: Document) -> None:
        assert ray_service["spec"]["rayClusterConfig"]["rayVersion"] == version("ray")
        pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
        assert f"ray=={version('ray')}" in pins

    def test_qdrants_client_accepts_the_server(self, documents: tuple[Document, ...]) -> None:
        image = only(of_kind(documents, "StatefulSet"))["spec"]["template"]["spec"]["containers"][0]["image"]
        server = re.fullmatch(r"qdrant/qdrant:v1\.(\d+)\.\d+-unprivileged", image)

        assert server is not None
        assert abs(int(server[1]) - int(version("qdrant-client").split(".")[1])) <= 1

    def test_images_have_the_packages_version(self, ray_service: Document, documents: tuple[Document, ...]) -> None:
        tag = "dev" if documents is rendered(FOLDERS["local"]) else blockrag.__version__

        images = {template["spec"]["containers"][0]["image"] for template in pod_templates(ray_service).values()}
        assert images == {f"blockrag:{tag}"}


class TestComponents:
    @pytest.fixture
    def combined(self, tmp_path: Path) -> tuple[Document, ...]:
        def relative(folder: Path) -> str:
            return os.path.relpath(folder.resolve(), tmp_path.resolve())

        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "blockrag",
            "resources": [relative(FOLDERS["gpu"])],
            "components": [relative(folder) for folder in sorted((KUBERNETES / "components").iterdir())],
        }
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        return rendered(tmp_path)

    def test_they_are_valid_together(self, combined: tuple[Document, ...], strict_schema: Document) -> None:
        for document in combined:
            if document["kind"] == "RayService":
                assert list(jsonschema.Draft202012Validator(strict_schema).iter_errors(document)) == []
            elif not document["apiVersion"].startswith(_OTHERS):
                assert refusal(document) is None

    def test_replicas_send_spans_to_the_collector(self, combined: tuple[Document, ...]) -> None:
        services = {item["metadata"]["name"]: item for item in of_kind(combined, "Service")}
        port = services["otel-collector"]["spec"]["ports"][0]["port"]

        for template in pod_templates(only(of_kind(combined, "RayService"))).values():
            variables = {item["name"]: item.get("value") for item in template["spec"]["containers"][0]["env"]}
            endpoint = variables["BLOCKRAG_TELEMETRY__OTLP_ENDPOINT"]
            assert endpoint == f"http://otel-collector:{port}"
            environment = {"BLOCKRAG_TELEMETRY__OTLP_ENDPOINT": endpoint}
            assert load_settings(None, environment=environment).telemetry.otlp_endpoint == endpoint
