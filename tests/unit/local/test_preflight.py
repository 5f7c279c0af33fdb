import socket
from pathlib import Path

import pytest

from blockrag.errors import EnvironmentSetupError
from blockrag.local.preflight import check_machine, check_port, free_port
from blockrag.local.state import own_state, write_state
from blockrag.settings import ClusterSettings, GatewaySettings, KvCacheSettings, Settings
from blockrag.tenants import TenantSettings


def _settings(tmp_path: Path, **cluster: object) -> Settings:
    values = {"state_dir": str(tmp_path), "grpc_port": free_port(), "http_port": free_port(), "object_store_mb": 128}
    return Settings(cluster=ClusterSettings(**(values | cluster)), kv_cache=KvCacheSettings(budget_mb=64))


def test_a_ready_machine_passes(tmp_path: Path) -> None:
    assert check_machine(_settings(tmp_path)) is None


def test_a_port_in_use_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentSetupError, match=rf"port {port} .* change cluster\.grpc_port"):
            check_machine(_settings(tmp_path, grpc_port=port))
    check_port("127.0.0.1", port, "cluster.grpc_port")


def test_too_little_shared_memory_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentSetupError, match=r"MiB free and cluster\.object_store_mb asks for"):
        check_machine(_settings(tmp_path, object_store_mb=10**9))


def test_a_store_too_small_for_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentSetupError, match=r"spilled to disk"):
        check_machine(_settings(tmp_path, object_store_mb=80))


def test_more_than_the_disk_has_is_refused(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    cache = settings.kv_cache.model_copy(update={"disk_mb": 2**40, "disk_path": str(tmp_path / "not" / "there")})
    with pytest.raises(EnvironmentSetupError, match=r"kv_cache\.disk_mb is .* has \d+ MiB in all"):
        check_machine(settings.model_copy(update={"kv_cache": cache}))
    assert not (tmp_path / "not").exists()


def test_a_running_system_is_not_started_twice(tmp_path: Path) -> None:
    write_state(tmp_path, own_state("127.0.0.1:9000").with_phase("ready"))
    with pytest.raises(EnvironmentSetupError, match=r"already running at 127\.0\.0\.1:9000 .* 'blockrag down'"):
        check_machine(_settings(tmp_path))


def test_another_ray_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(EnvironmentSetupError, match=r"RAY_ADDRESS=10\.0\.0\.1:6379 .* already running"):
        check_machine(_settings(tmp_path))


def test_an_open_address_needs_keys(tmp_path: Path) -> None:
    settings = _settings(tmp_path, host="0.0.0.0")
    with pytest.raises(EnvironmentSetupError, match=r"gateway\.tenants is empty"):
        check_machine(settings)
    tenants = GatewaySettings(tenants=(TenantSettings(name="one", api_key="0123456789abcdef"),))
    assert check_machine(settings.model_copy(update={"gateway": tenants})) is None
