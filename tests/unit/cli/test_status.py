from __future__ import annotations

import pytest

from blockrag.cli import console
from blockrag.cli.system import _status_tables
from blockrag.client_messages import description
from blockrag.v1.decoder_pb2 import GetDecoderStatusResponse
from blockrag.v1.kv_cache_pb2 import DiskUsage, GetKvCacheStatusResponse
from blockrag.v1.system_pb2 import DescribeResponse, Quota, TenantQuotas

MIB = 2**20


def print_status(response: DescribeResponse) -> None:
    console.answer(False, None, *_status_tables(description(response)))


def shown(cache: GetKvCacheStatusResponse | None, capsys: pytest.CaptureFixture[str]) -> str:
    print_status(DescribeResponse(kv_cache=cache))
    return " ".join(capsys.readouterr().out.split())


def test_the_disk_is_shown_with_its_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    disk = DiskUsage(
        blocks=3, bytes=5 * MIB, budget_bytes=9 * MIB, hits=2, rejected=1, dropped=4, warnings=["[full] disk"]
    )
    text = shown(GetKvCacheStatusResponse(disk=disk), capsys)
    assert "on disk 3 blocks, 5 of 9 MiB, 2 hits, 0 evicted, 1 rejected, 4 dropped [full] disk" in text


def test_a_disk_that_cannot_be_used_is_its_warning_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(GetKvCacheStatusResponse(disk=DiskUsage(warnings=["read-only"])), capsys)
    assert "read-only" in text
    assert "on disk" not in text


def test_a_volume_without_a_disk_is_shown_with_what_happened_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(GetKvCacheStatusResponse(disk=DiskUsage(hits=2, written=3, dropped=1)), capsys)
    assert "on the volume 2 hits, 0 evicted, 0 rejected, 1 dropped" in text


def test_without_an_answer_of_the_cache_there_is_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert "object store cache 0 blocks" in shown(None, capsys)


def test_what_steps_and_blocks_are_kept_in(capsys: pytest.CaptureFixture[str]) -> None:
    decoder = GetDecoderStatusResponse(
        compute_dtype="bfloat16", device="cpu", weights="int8", kv_dtype="int8", slot_bytes=11520
    )
    print_status(DescribeResponse(decoder=decoder))
    text = " ".join(capsys.readouterr().out.split())
    assert "computes bfloat16 on cpu, weights in eight bits for decode steps" in text
    assert "blocks int8, 11.2 KiB a token" in text


def test_what_tenants_use_of_their_limits_is_shown_where_there_are_limits(capsys: pytest.CaptureFixture[str]) -> None:
    limited = TenantQuotas(tenant="acme", quotas=[Quota(name="documents", used=7, limit=10), Quota(name="uploads")])
    print_status(DescribeResponse(tenants=[limited]))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("acme", "documents", "7", "10", "uploads", "-"))
    print_status(DescribeResponse(tenants=[TenantQuotas(tenant="public", quotas=[Quota(name="uploads")])]))
    assert "public" not in capsys.readouterr().out
