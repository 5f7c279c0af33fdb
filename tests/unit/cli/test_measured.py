"""What the commands that measure share: numbers in lists, and settings of a system of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockrag.cli.measured import WITHOUT_KEYS, own_settings, parse_numbers, parse_rates
from blockrag.errors import SetupError
from blockrag.local.preflight import check_exposure
from blockrag.settings import ClusterSettings, GatewaySettings, KvCacheSettings, RetrieverSettings, Settings
from blockrag.tenants import TenantSettings


def test_numbers_are_distinct_and_ascending_and_rates_as_they_were_named() -> None:
    assert parse_numbers("512, 128,512", "--contexts", most=1000) == (128, 512)
    assert parse_rates("2,0.5,2", "--rates") == (2.0, 0.5)
    assert parse_numbers("", "--counts", most=9) == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1,x", "--at '1,x': write numbers separated by commas"),
        ("1.5", "--at '1.5': write whole numbers"),
        ("nan", "--at 'nan': write whole numbers"),
        ("3,9", "--at '3,9': each number must be 4 to 10"),
        ("4,11", "--at '4,11': each number must be 4 to 10"),
    ],
)
def test_other_lists_are_refused(text: str, problem: str) -> None:
    with pytest.raises(SetupError, match=problem):
        parse_numbers(text, "--at", most=10, least=4)


def test_a_system_of_one_s_own_shares_nothing_with_the_one_in_use(tmp_path: Path) -> None:
    given = Settings(
        cluster=ClusterSettings(host="0.0.0.0"),
        gateway=GatewaySettings(tenants=(TenantSettings(name="acme", api_key="acme-key-0123456789"),)),
        retriever=RetrieverSettings(path="/srv/index"),
        kv_cache=KvCacheSettings(secret="a secret of this test", disk_path="/srv/blocks", volume="file:///mnt/blocks"),
    )

    own = own_settings(given, tmp_path, 1000, retriever={"threads": 2}, gateway=WITHOUT_KEYS)

    assert (own.retriever.path, own.retriever.threads) == ("", 2)
    assert (own.disk_path, own.kv_cache.volume) == (tmp_path / "blocks", "")
    assert not own.gateway.asks_for_keys  # nobody else can reach it, and the command has no key
    check_exposure(own)


def test_a_cache_of_a_system_of_one_s_own_fits_its_object_store(tmp_path: Path) -> None:
    given = Settings(cluster=ClusterSettings(object_store_mb=300, num_cpus=3), kv_cache=KvCacheSettings(disk_mb=7))

    own = own_settings(given, tmp_path, 1000, decoder={"l1_mb": 64})

    assert own.state_path == tmp_path
    assert {own.cluster.grpc_port, own.cluster.http_port}.isdisjoint({9000, 8000})
    assert (own.cluster.object_store_mb, own.kv_cache.budget_mb, own.decoder.l1_mb) == (1500, 1000, 64)
    assert (own.cluster.num_cpus, own.kv_cache.disk_mb, own.retriever) == (3, 7, given.retriever)
