"""Spans: parents, files, sampling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blockrag.settings import ClusterSettings, Settings
from blockrag.telemetry import (
    new_traceparent,
    read_trace,
    setup_telemetry,
    shutdown_telemetry,
    span,
    trace_directory,
    trace_id_of,
)
from blockrag.v1.common_pb2 import RequestContext


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    yield _settings(tmp_path)
    shutdown_telemetry()


def _settings(path: Path, **telemetry: object) -> Settings:
    return Settings.model_validate({"cluster": {"state_dir": str(path)}, "telemetry": telemetry})


def is_sampled(traceparent: str) -> bool:
    return int(traceparent[-2:], 16) & 1 == 1


def test_spans_of_one_request_form_a_tree(settings: Settings) -> None:
    setup_telemetry("gateway", settings)
    client = new_traceparent()
    context = RequestContext(request_id="r1", tenant="public", traceparent=client)
    with span("generate", context, top_k=5) as outer:
        child = outer.child_context()
        assert child.request_id == "r1"
        assert child.tenant == "public"
        with span("plan", child) as inner:
            inner.set(prompt_tokens=7, **{"gen_ai.usage.input_tokens": 7, "gen_ai.response.finish_reasons": ["stop"]})
    shutdown_telemetry()
    spans = read_trace(trace_directory(settings), trace_id_of(client))
    by_name = {stored.name: stored for stored in spans}
    assert [stored.name for stored in spans] == ["generate", "plan"]
    assert by_name["generate"].parent_span_id == client.split("-")[2]
    assert by_name["plan"].parent_span_id == by_name["generate"].span_id
    assert by_name["generate"].service == "gateway"
    assert by_name["generate"].attributes == {
        "blockrag.request_id": "r1",
        "blockrag.tenant": "public",
        "blockrag.top_k": "5",
    }
    assert by_name["plan"].attributes["gen_ai.usage.input_tokens"] == "7"
    assert by_name["plan"].attributes["gen_ai.response.finish_reasons"] == "stop"
    assert by_name["plan"].start_unix_ns <= by_name["plan"].end_unix_ns


def test_an_exception_marks_the_span_and_passes(settings: Settings) -> None:
    setup_telemetry("decoder", settings)
    client = new_traceparent()
    with pytest.raises(ValueError, match="no"), span("decode", RequestContext(traceparent=client)):
        raise ValueError("no")
    shutdown_telemetry()
    (stored,) = read_trace(trace_directory(settings), trace_id_of(client))
    assert stored.error == "ValueError: no"
    assert stored.attributes["error.type"] == "ValueError"


async def test_a_stream_that_its_reader_leaves_ends_its_span(settings: Settings) -> None:
    setup_telemetry("decoder", settings)
    client = new_traceparent()

    async def stream() -> AsyncIterator[int]:
        with span("decode", RequestContext(traceparent=client)):
            while True:
                yield 1
                await asyncio.sleep(0)

    events = stream()
    assert await anext(events) == 1
    # Another task closes it: spans hold no context variable that would have to be reset where it was set.
    await asyncio.create_task(events.aclose())  # type: ignore[attr-defined]
    shutdown_telemetry()
    (stored,) = read_trace(trace_directory(settings), trace_id_of(client))
    assert stored.error == "cancelled"


def test_the_clients_decision_not_to_sample_is_kept(settings: Settings) -> None:
    setup_telemetry("gateway", settings)
    client = new_traceparent(sampled=False)
    with span("generate", RequestContext(traceparent=client)) as current:
        assert trace_id_of(current.traceparent) == trace_id_of(client)
        assert not is_sampled(current.traceparent)
    shutdown_telemetry()
    assert read_trace(trace_directory(settings), trace_id_of(client)) == []


def test_ratio_decides_where_the_client_did_not(tmp_path: Path) -> None:
    settings = _settings(tmp_path, sampling_ratio=0.0)
    setup_telemetry("gateway", settings)
    with span("generate", RequestContext()) as current:
        assert not is_sampled(current.traceparent)
        child = current.child_context()
    with span("plan", child) as inner:
        assert not is_sampled(inner.traceparent)
    shutdown_telemetry()


def test_without_setup_the_callers_context_passes_through() -> None:
    shutdown_telemetry()
    client = new_traceparent()
    with span("generate", RequestContext(traceparent=client)) as current:
        assert current.child_context().traceparent == client
    with span("generate", None) as current:
        assert current.child_context().traceparent == ""


@pytest.mark.parametrize(
    "text", ["", "nonsense", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff-" + "1" * 32 + "-" + "1" * 16 + "-01"]
)
def test_a_malformed_traceparent_starts_a_new_trace(settings: Settings, text: str) -> None:
    setup_telemetry("gateway", settings)
    with span("generate", RequestContext(traceparent=text)) as current:
        assert len(trace_id_of(current.traceparent)) == 32
        assert trace_id_of(current.traceparent) != "0" * 32


def test_files_are_bounded_and_a_torn_line_is_skipped(tmp_path: Path, settings: Settings) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from blockrag.telemetry.tracing import TraceFileExporter

    directory = tmp_path / "small"
    exporter = TraceFileExporter(directory, "gateway", file_bytes=2_000, directory_bytes=6_000)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    for number in range(100):
        with tracer.start_as_current_span(f"span {number}") as current:
            trace_id = f"{current.get_span_context().trace_id:032x}"
    provider.shutdown()
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8_000
    assert [stored.name for stored in read_trace(directory, trace_id)] == ["span 99"]
    torn = json.dumps({"trace_id": trace_id})[:-4]
    (directory / "torn.jsonl").write_text(torn)
    assert len(read_trace(directory, trace_id)) == 1
    assert read_trace(tmp_path / "missing", trace_id) == []


def test_of_a_trace_a_tenant_is_given_its_own_spans(tmp_path: Path) -> None:
    settings = Settings(cluster=ClusterSettings(state_dir=str(tmp_path)))
    directory = trace_directory(settings)
    directory.mkdir(parents=True)
    rows = [
        {"trace_id": "f" * 32, "span_id": str(number), "attributes": {"blockrag.tenant": tenant, "text": text}}
        for number, (tenant, text) in enumerate(
            [("acme", ""), ("umbrella", '"blockrag.tenant":"acme"'), ("umbrella", ""), ("acme", "x")]
        )
    ]
    spare = {"parent_span_id": "", "name": "n", "service": "s", "start_unix_ns": 1, "end_unix_ns": 2}
    lines = [json.dumps({**spare, **row}, separators=(",", ":")) for row in rows]
    (directory / "gateway-1-0.jsonl").write_text("\n".join(lines))
    assert [each.span_id for each in read_trace(directory, "f" * 32, tenant="acme")] == ["0", "3"]
    assert len(read_trace(directory, "f" * 32)) == 4
    assert read_trace(directory, "f" * 32, tenant="nobody") == []
