from pathlib import Path

import pytest

from blockrag.errors import SettingsError
from blockrag.settings import ClusterSettings, Settings, load_settings


def test_defaults_need_no_file() -> None:
    assert load_settings(environment={}) == Settings()


def test_file_and_environment_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("gateway:\n  max_inflight: 3\n  default_top_k: 7\n")
    settings = load_settings(path, {"BLOCKRAG_GATEWAY__MAX_INFLIGHT": "16", "HOME": "/nowhere"})
    assert settings.gateway.max_inflight == 16
    assert settings.gateway.default_top_k == 7


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gatway: {}", "gatway"),
        ("gateway: {max_inflihgt: 3}", "gateway.max_inflihgt"),
        ("gateway: {max_inflight: 0}", "gateway.max_inflight"),
        ("decoder: {num_gpus: -1}", "decoder.num_gpus"),
        ("gateway: {tenants: [{name: A B, api_key: short}]}", "gateway.tenants.0.name"),
        ("- a list", "mapping"),
        ("gateway: [", "settings file"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=named.replace(".", r"\.")):
        load_settings(path, {})


def test_the_tenants_key_is_no_setting() -> None:
    assert load_settings(environment={"BLOCKRAG_KEY": "a key"}) == Settings()


def test_the_cache_directory_is_no_setting() -> None:
    assert load_settings(environment={"BLOCKRAG_CACHE": "/somewhere"}) == Settings()


@pytest.mark.parametrize(
    "environment",
    [
        {"BLOCKRAG_GATEWAY__NO_SUCH_KEY": "1"},
        {"BLOCKRAG_NO_SUCH_SECTION__KEY": "1"},
        {"BLOCKRAG_GATEWAY": "1"},
        {"BLOCKRAG_GATEWAY__MAX_INFLIGHT": "many"},
        {"BLOCKRAG_GATEWAY__MAX_INFLIGHT": "["},
        {"BLOCKRAG_GATEWAY__MAX_TIMEOUT_MS": str(2**32)},
        {"BLOCKRAG_GATEWAY__DEFAULT_RATE": "0.5"},
        {"BLOCKRAG_GATEWAY__DEFAULT_RATE": "most"},
        {"BLOCKRAG_INGEST__PARSE_TIMEOUT_S": ".inf"},
    ],
)
def test_bad_environment_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        load_settings(environment=environment)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="absent"):
        load_settings(tmp_path / "absent.yaml", {})


@pytest.mark.parametrize(("host", "target"), [("::1", "[::1]:9000"), ("127.0.0.1", "127.0.0.1:9000")])
def test_the_ingress_can_be_dialled_at_every_address_of_this_machine(host: str, target: str) -> None:
    """gRPC takes ::1:9000 for an address without a port. This is what ``blockrag up`` tells later commands."""
    assert Settings(cluster=ClusterSettings(host=host)).cluster.target == target


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        Settings().gateway.max_inflight = 5  # type: ignore[misc]


def test_tenants_need_a_secret_that_nobody_knows() -> None:
    tenants = {"BLOCKRAG_GATEWAY__TENANTS": '[{"name": "acme", "api_key": "acme-key-0123456789"}]'}
    with pytest.raises(SettingsError, match=r"^Value error, kv_cache\.secret must be set .* openssl rand"):
        load_settings(environment=tenants)
    settings = load_settings(environment={**tenants, "BLOCKRAG_KV_CACHE__SECRET": "0123456789abcdef"})
    assert settings.gateway.tenants[0].name == "acme"
