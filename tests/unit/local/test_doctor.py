"""What the doctor finds, on this machine and with settings that are wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.local.doctor import Finding, examine
from blockrag.local.preflight import free_port
from blockrag.settings import (
    BundleSettings,
    ClusterSettings,
    DecoderSettings,
    GatewaySettings,
    KvCacheSettings,
    Settings,
)
from blockrag.tenants import TenantSettings


def settings(tmp_path: Path, bundle: Path, **sections: object) -> Settings:
    cluster = ClusterSettings(
        state_dir=str(tmp_path / "state"), grpc_port=free_port(), http_port=free_port(), object_store_mb=128
    )
    fields = {"bundle": BundleSettings(path=str(bundle)), "cluster": cluster, "kv_cache": KvCacheSettings(budget_mb=64)}
    return Settings(**{**fields, **sections})  # type: ignore[arg-type]


def of(findings: list[Finding], subject: str) -> Finding:
    (found,) = [finding for finding in findings if finding.subject == subject]
    return found


def test_a_ready_machine_has_no_problem(tmp_path: Path, small_bundle: Path) -> None:
    findings = examine(settings(tmp_path, small_bundle))
    assert [finding for finding in findings if finding.level == "problem"] == []
    assert all(finding.way_out for finding in findings if finding.level != "ok" and finding.subject != "kernels")
    assert not (tmp_path / "state").exists()


def test_every_problem_has_its_way_out(tmp_path: Path, small_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = ClusterSettings(state_dir=str(tmp_path), grpc_port=port, http_port=free_port(), object_store_mb=10**9)
        findings = examine(settings(tmp_path, tmp_path / "no-bundle", cluster=cluster))
    assert of(findings, "shared memory").level == "problem"
    assert "lower cluster.object_store_mb" in of(findings, "shared memory").way_out
    assert of(findings, "cluster.grpc_port").way_out == "free it or change cluster.grpc_port"
    assert of(findings, "cluster.http_port").level == "ok"
    assert of(findings, "bundle").level == "problem"


def test_budgets_are_held_against_the_model(tmp_path: Path, small_bundle: Path) -> None:
    few = settings(tmp_path, small_bundle, decoder=DecoderSettings(slots=16))
    assert of(examine(few), "slots").level == "warning"
    many = settings(tmp_path, small_bundle, decoder=DecoderSettings(l1_mb=10**7))
    assert "decoder.l1_mb" in of(examine(many), "memory").way_out
    cluster = ClusterSettings(state_dir=str(tmp_path), grpc_port=free_port(), http_port=free_port(), object_store_mb=64)
    spilling = settings(tmp_path, small_bundle, cluster=cluster)
    assert "spilled to disk" in of(examine(spilling), "shared memory").way_out


def test_an_open_door_without_keys(tmp_path: Path, small_bundle: Path) -> None:
    cluster = ClusterSettings(
        state_dir=str(tmp_path), host="0.0.0.0", grpc_port=free_port(), http_port=free_port(), object_store_mb=128
    )
    assert of(examine(settings(tmp_path, small_bundle, cluster=cluster)), "access").level == "problem"
    closed = settings(
        tmp_path,
        small_bundle,
        cluster=cluster,
        gateway=GatewaySettings(tenants=(TenantSettings(name="one", api_key="0123456789abcdef"),)),
        kv_cache=KvCacheSettings(budget_mb=64, secret="0123456789abcdef"),
    )
    assert [of(examine(closed), subject).level for subject in ("access", "secret")] == ["ok", "ok"]


@pytest.mark.parametrize(("store", "status"), [(128, 0), (10**9, 1)])
def test_the_command(tmp_path: Path, small_bundle: Path, store: int, status: int) -> None:
    chosen = settings(tmp_path, small_bundle).model_dump(mode="json")
    chosen["cluster"]["object_store_mb"] = store
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(chosen))
    done = CliRunner().invoke(app, ["doctor", "--settings", str(file), "--json"])
    assert done.exit_code == status, done.output
    assert {"shared memory", "bundle", "memory"} <= {each["subject"] for each in json.loads(done.stdout)["findings"]}
    table = CliRunner().invoke(app, ["doctor", "--settings", str(file)])
    assert "way out" in table.stdout
