"""What the doctor finds, on this machine and with settings that are wrong."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.local import doctor
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


def test_tenants_of_a_file_are_counted_and_must_be_readable(tmp_path: Path, small_bundle: Path) -> None:
    """The gateway would not come up without the file."""
    file = tmp_path / "tenants.yaml"
    shared = KvCacheSettings(budget_mb=64, secret="0123456789abcdef")
    asked = settings(tmp_path, small_bundle, gateway=GatewaySettings(tenants_file=str(file)), kv_cache=shared)
    found = of(examine(asked), "access")
    assert (found.level, "tenants.yaml" in found.text, "tenants_file" in found.way_out) == ("problem", True, True)
    file.write_text("- {name: one, api_key: 0123456789abcdef0}\n- {name: two, api_key: fedcba98765432100}\n")
    assert of(examine(asked), "access") == Finding("access", "ok", "2 tenants with keys")


def test_more_blocks_than_the_disk_has(tmp_path: Path, small_bundle: Path) -> None:
    """What ``blockrag up`` refuses."""
    large = settings(tmp_path, small_bundle, kv_cache=KvCacheSettings(budget_mb=64, disk_mb=10**9))
    found = of(examine(large), "blocks on disk")
    assert (found.level, found.way_out) == ("problem", "lower it, or set kv_cache.disk_path to a larger disk")


def volume(tmp_path: Path, bundle: Path, url: str) -> Finding:
    cache = KvCacheSettings(budget_mb=64, volume=url)
    return of(examine(settings(tmp_path, bundle, kv_cache=cache)), "volume")


def test_a_volume_is_written_read_and_removed_from(tmp_path: Path, small_bundle: Path) -> None:
    (tmp_path / "volume").mkdir()
    assert volume(tmp_path, small_bundle, f"file://{tmp_path}/volume").level == "ok"
    assert list((tmp_path / "volume").iterdir()) == []
    assert "volume" not in {finding.subject for finding in examine(settings(tmp_path, small_bundle))}


@pytest.mark.parametrize(
    ("url", "text", "way_out"),
    [
        ("s4://bucket/blocks", "ValueError: Protocol not known: s4", "protocol of fsspec"),
        ("dvc://repository", "ImportError: Install dvc", "install the package"),
        ("file:///dev/null/blocks", "/dev/null/blocks: no such directory", "check that the place exists"),
    ],
)
def test_what_is_wrong_with_a_volume(tmp_path: Path, small_bundle: Path, url: str, text: str, way_out: str) -> None:
    finding = volume(tmp_path, small_bundle, url)
    assert finding.level == "problem"
    assert finding.text.startswith(f"kv_cache.volume, a file cannot be written: {text}")
    assert way_out in finding.way_out


def refuse(*_: object, **__: object) -> NoReturn:
    raise PermissionError("Access Denied")


@pytest.mark.parametrize(("method", "step"), [("pipe_file", "written"), ("cat_file", "read"), ("rm_file", "removed")])
def test_a_volume_without_a_permission(
    tmp_path: Path, small_bundle: Path, method: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(LocalFileSystem, method, refuse)
    finding = volume(tmp_path, small_bundle, f"file://{tmp_path}/volume")
    assert finding.text == f"kv_cache.volume, a file cannot be {step}: Access Denied"
    assert "credentials" in finding.way_out
    assert len(list((tmp_path / "volume").iterdir())) == (step == "removed")


def test_a_volume_that_does_not_answer(tmp_path: Path, small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(LocalFileSystem, "exists", lambda *_, **__: released.wait(30))
    monkeypatch.setattr(doctor, "_VOLUME_TIMEOUT_S", 0.1)
    finding = volume(tmp_path, small_bundle, f"file://{tmp_path}/volume")
    released.set()
    assert finding.text == "kv_cache.volume did not answer within 0.1 s"


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
