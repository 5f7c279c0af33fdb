"""Finished spans as JSON lines in files, so that a trace can be shown without a collector.

Each process appends to a file of its own and starts a new one past a size; the directory as a whole is bounded by
deleting the oldest files.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

from blockrag.results import TraceSpan
from blockrag.settings import Settings

TENANT = "blockrag.tenant"
"""Attribute that says whose a span is."""
FILE_BYTES = 4 * 2**20
DIRECTORY_BYTES = 48 * 2**20


@dataclass(frozen=True)
class StoredSpan(TraceSpan):
    """One finished span, as kept in files."""

    trace_id: str = ""


def trace_directory(settings: Settings) -> Path:
    """Where this node's processes keep their spans."""
    return settings.state_path / "traces"


class TraceFileExporter(SpanExporter):
    """Appends spans to ``directory/<service>-<pid>-<n>.jsonl``."""

    def __init__(
        self, directory: Path, service: str, *, file_bytes: int = FILE_BYTES, directory_bytes: int = DIRECTORY_BYTES
    ) -> None:
        self._directory = directory
        self._service = service
        self._file_bytes = file_bytes
        self._directory_bytes = directory_bytes
        self._lock = threading.Lock()
        self._number = 0
        directory.mkdir(parents=True, exist_ok=True)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes the spans; FAILURE when the disk refuses, which loses spans and nothing else."""
        lines = b"".join(_line(span, self._service) for span in spans)
        try:
            with self._lock:
                path = self._path()
                if path.exists() and path.stat().st_size + len(lines) > self._file_bytes:
                    self._number += 1
                    path = self._path()
                    _trim(self._directory, self._directory_bytes)
                # One write of whole lines: a reader never sees half of a batch's last line for long.
                with path.open("ab", buffering=0) as file:
                    file.write(lines)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held open."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held back."""
        return True

    def _path(self) -> Path:
        return self._directory / f"{self._service}-{os.getpid()}-{self._number}.jsonl"


def read_trace(directory: Path, trace_id: str, tenant: str | None = None) -> list[StoredSpan]:
    """All spans of a trace (32 hex digits) in a directory, in order of their start; empty when there are none.

    ``tenant``: only those that name it. It takes as long whether others' spans are there or not.
    """
    wanted = trace_id.strip().lower()
    owner = b"" if tenant is None else b'"' + TENANT.encode() + b'":"' + tenant.encode() + b'"'
    found: list[StoredSpan] = []
    for path in directory.glob("*.jsonl"):
        try:
            content = path.read_bytes()
        except OSError:  # deleted by the rotation meanwhile
            continue
        for line in _lines_with(content, wanted.encode()):
            if owner not in line:
                continue
            try:
                stored = StoredSpan(**json.loads(line))
            except (ValueError, TypeError):  # the last line while it is being written
                continue
            if stored.trace_id == wanted and tenant in (None, stored.attributes.get(TENANT)):
                found.append(stored)
    return sorted(found, key=lambda stored: (stored.start_unix_ns, stored.end_unix_ns))


def _lines_with(content: bytes, wanted: bytes) -> Iterator[bytes]:
    end = 0
    while wanted and (place := content.find(wanted, end)) >= 0:
        start, end = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place)
        end = len(content) if end < 0 else end
        yield content[start:end]


def _line(span: ReadableSpan, service: str) -> bytes:
    context = span.context
    parent = span.parent
    failed = span.status.status_code is StatusCode.ERROR
    stored = StoredSpan(
        trace_id=f"{context.trace_id:032x}" if context else "",
        span_id=f"{context.span_id:016x}" if context else "",
        parent_span_id=f"{parent.span_id:016x}" if parent is not None else "",
        name=span.name,
        service=service,
        start_unix_ns=span.start_time or 0,
        end_unix_ns=span.end_time or 0,
        attributes={key: str(value) for key, value in (span.attributes or {}).items()},
        error=(span.status.description or "failed") if failed else "",
    )
    return json.dumps(asdict(stored), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _trim(directory: Path, most_bytes: int) -> None:
    files = []
    for path in directory.glob("*.jsonl"):
        try:
            status = path.stat()
        except OSError:
            continue
        files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
