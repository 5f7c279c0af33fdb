from __future__ import annotations

import pytest

from blockrag.cli.top import Scrape, summary
from blockrag.errors import UnavailableError
from blockrag.results import Description

BEFORE = """
# TYPE ray_blockrag_requests_total counter
ray_blockrag_requests_total{method="Generate",status="OK",tenant="a",pid="1"} 10
ray_blockrag_requests_total{method="Generate",status="UNAVAILABLE",tenant="a",pid="1"} 2
ray_other_total 5
"""
AFTER = """
# TYPE ray_blockrag_requests_total counter
ray_blockrag_requests_total{method="Generate",status="OK",tenant="a",pid="1"} 14
ray_blockrag_requests_total{method="Generate",status="UNAVAILABLE",tenant="a",pid="2"} 1
ray_blockrag_requests_total{method="Retrieve",status="OK",tenant="b",pid="2"} 3
# TYPE ray_blockrag_time_to_first_token_seconds histogram
ray_blockrag_time_to_first_token_seconds_bucket{attention_mode="block",pid="1",le="0.1"} 2
ray_blockrag_time_to_first_token_seconds_bucket{attention_mode="block",pid="1",le="0.2"} 6
ray_blockrag_time_to_first_token_seconds_bucket{attention_mode="block",pid="1",le="+Inf"} 8
ray_blockrag_time_to_first_token_seconds_bucket{attention_mode="block",pid="2",le="0.1"} 2
ray_blockrag_time_to_first_token_seconds_bucket{attention_mode="block",pid="2",le="0.2"} 2
ray_blockrag_time_to_first_token_seconds_bucket{attention_mode="block",pid="2",le="+Inf"} 2
ray_blockrag_time_to_first_token_seconds_count{attention_mode="block",pid="1"} 8
ray_blockrag_time_to_first_token_seconds_count{attention_mode="block",pid="2"} 2
# TYPE ray_blockrag_kv_cache_query_tokens_total counter
ray_blockrag_kv_cache_query_tokens_total{tier="l1"} 200
ray_blockrag_kv_cache_hit_tokens_total{tier="l1"} 150
"""


def test_growth_counts_new_processes_from_zero() -> None:
    grown = Scrape.parse(AFTER).since(Scrape.parse(BEFORE))

    assert grown.by("requests_total", "method") == {"Generate": 5, "Retrieve": 3}
    assert grown.total("requests_total", status="UNAVAILABLE") == 1
    assert grown.by("requests_total", "nothing") == {}
    assert grown.total("other_total") == 0


def test_quantiles_follow_prometheus_rule() -> None:
    scrape = Scrape.parse(AFTER)

    # of 10 values 4 are at most 0.1 and 8 at most 0.2
    assert scrape.quantile("time_to_first_token_seconds", 0.5) == pytest.approx(0.125)
    assert scrape.quantile("time_to_first_token_seconds", 0.2) == pytest.approx(0.05)
    assert scrape.quantile("time_to_first_token_seconds", 0.99) == pytest.approx(0.2)
    assert scrape.quantile("time_to_first_token_seconds", 0.5, attention_mode="full") is None


def test_a_summary_of_an_interval() -> None:
    description = Description(
        version="",
        bundle_name="",
        bundle_fingerprint="",
        max_positions=0,
        max_top_k=0,
        max_question_chars=0,
        max_document_bytes=0,
        services=(),
        retriever={},
        encoder={},
        kv_cache={"bytes": 50, "budget_bytes": 100},
        decoder={"l1_bytes": 3, "l1_budget_bytes": 4, "running": 2, "waiting": 1},
    )
    values = summary(Scrape.parse(AFTER).since(Scrape.parse(BEFORE)), 2.0, description)

    assert values["requests_per_s"] == {"Generate": 2.5, "Retrieve": 1.5}
    assert values["failed_per_s"] == {"UNAVAILABLE": 0.5}
    assert values["time_to_first_token_ms"]["block"]["p50"] == pytest.approx(125)
    assert values["tiers"]["l1"] == {"tokens_per_s": 100, "hit_rate": 0.75, "bytes": 3, "budget_bytes": 4}
    assert values["tiers"]["store"]["bytes"] == 50 and values["waiting"] == 1


def test_no_metrics_there() -> None:
    with pytest.raises(UnavailableError, match="metrics at http"):
        Scrape.of("http://127.0.0.1:1/metrics")
    with pytest.raises(UnavailableError, match="unknown url type"):
        Scrape.of("nothing")
