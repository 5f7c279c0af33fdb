"""Requests that no client of good will sends, generated from the protocol and a seed: they may be refused, no more.

``python -m tests.system.hostile --requests 10000`` starts a system of its own, sends so many to each gRPC service and
over HTTP, and prints what was answered, what should not have been, and how the processes' memory went.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import grpc

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.local.state import read_state
from tests.system.faults import descendants, fault_settings, private_mib
from tests.system.hostile_messages import Generator
from tests.system.rpcs import Rpc, all_rpcs, call

BAD_CODES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE)
"""What no request may be answered with, whatever it is: faults of the server's, and processes that went."""
AT_A_TIME = 8


@dataclass
class Report:
    """What came of the requests."""

    answers: dict[str, Counter[str]] = field(default_factory=dict)
    """By service, how many of each status."""
    bad: list[str] = field(default_factory=list)
    """What should not have been answered so."""

    def note(self, service: str, status: str, bad: str = "") -> None:
        """Counts an answer; ``bad``: what to say of it where it is none that may be."""
        self.answers.setdefault(service, Counter())[status] += 1
        if bad:
            self.bad.append(bad)

    @property
    def requests(self) -> int:
        """All that were sent."""
        return sum(counter.total() for counter in self.answers.values())


async def attack_grpc(target: str, requests: int, seed: int, report: Report) -> None:
    """Sends so many requests to each service."""
    by_service: dict[str, list[Rpc]] = {}
    for rpc in all_rpcs():
        by_service.setdefault(rpc.service, []).append(rpc)
    async with grpc.aio.insecure_channel(target) as channel:
        for rpcs in by_service.values():
            make = Generator(seed)
            await _several(requests, lambda make=make, rpcs=rpcs: _one(channel, make, rpcs, report))  # type: ignore[misc]


async def _one(channel: grpc.aio.Channel, make: Generator, rpcs: Sequence[Rpc], report: Report) -> None:
    rpc = make.draw.choice(rpcs)
    messages, metadata = make.messages(rpc), make.metadata()
    ends: dict[str, float | None] = make.draw.choice(
        (
            {},
            {},
            {"cancel_after_s": make.draw.choice((0.0, 0.001, 0.01, 0.1))},
            {"timeout_s": make.draw.choice((0.001, 0.05, 1.0))},
            {"pause_s": 0.2},
        )
    )
    options: dict[str, Any] = {"timeout_s": 20.0, **ends}
    try:
        outcome = await call(channel, rpc, *messages, metadata=metadata, **options)
    except (ValueError, TypeError, grpc.aio.UsageError) as error:  # gRPC itself sends it not
        report.note(rpc.service, type(error).__name__)
        return
    bad = ""
    if outcome.code in BAD_CODES:
        sizes = [len(message) for message in messages]
        bad = (
            f"{rpc.path} {outcome.code.name}: {outcome.details[:200]} (messages {sizes}, {options}, {metadata!s:.200})"
        )
    report.note(rpc.service, outcome.code.name, bad)


async def attack_http(url: str, requests: int, seed: int, report: Report) -> None:
    """Sends so many over HTTP."""
    make = Generator(seed)
    parts = urlsplit(url)
    paths = await _paths(url)
    await _several(requests, lambda: _one_http(str(parts.hostname), int(parts.port or 80), paths, make, report))


async def _paths(url: str) -> list[tuple[str, str]]:
    """Every method and path of the OpenAPI schema."""
    parts = urlsplit(url)
    status, body = await _exchange(
        str(parts.hostname),
        int(parts.port or 80),
        b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    if status != 200:
        raise LookupError(f"/openapi.json answers {status}")
    schema = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])
    return [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]


async def _one_http(host: str, port: int, paths: Sequence[tuple[str, str]], make: Generator, report: Report) -> None:
    draw = make.draw
    method, path = draw.choice(paths)
    if draw.random() < 0.1:
        method, path = draw.choice(("GET", "POST", "PUT", "BREW")), "/v1/" + quote(make._text()[:500])
    while "{" in path:
        name = path[path.index("{") : path.index("}") + 1]
        path = path.replace(name, quote(draw.choice(("default", "x", make._text()[:300])), safe="") or "x")
    if draw.random() < 0.2:
        path += "?" + quote(make._text()[:300], safe="=&")
    kind, body = draw.choice((_json_noise, _json_like, _json_like, _json_deep, _form, _bytes))(make)
    headers = {"Host": f"{host}:{port}", "Content-Type": kind, "Connection": "close"}
    if draw.random() < 0.2:
        headers[draw.choice(("Authorization", "X-Request-Id", "traceparent", "Accept", "X-Long"))] = make._ascii() * 3
    declared = len(body)
    if draw.random() < 0.1:
        declared += draw.choice((1, 1000, 10**12))  # what never comes
    if draw.random() < 0.1:
        headers["Transfer-Encoding"] = "chunked"
        body = b"%x\r\n%s\r\n" % (len(body), body) + (b"0\r\n\r\n" if draw.random() < 0.5 else b"zz\r\n")
    else:
        headers["Content-Length"] = str(declared)
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    data = head.encode("latin-1", "replace") + b"\r\n" + body
    if draw.random() < 0.1:
        data = data[: draw.randint(1, len(data))]
    status, said = await _exchange(host, port, data, slow=draw.random() < 0.05)
    bad = f"{method} {path[:200]} {status}: {said[:300]!r}" if status in (500, 502) else ""
    report.note("http", str(status or "nothing"), bad)


def _json_noise(make: Generator) -> tuple[str, bytes]:
    return "application/json", make.draw.randbytes(make.draw.choice((0, 1, 50, 5000)))


def _json_like(make: Generator) -> tuple[str, bytes]:
    """Fields that there are, with values that they do not have."""
    draw = make.draw
    values: tuple[Any, ...] = (
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        make._text(),
        [],
        {},
        [[]],
        [{"role": make._text()}],
    )
    names = (
        *("model", "messages", "input", "stream", "temperature", "top_p", "max_tokens", "seed", "stop", "blockrag"),
        *("query", "filters", "max_num_results", "file_id", "metadata", "instructions", "stream_options", "n", "tools"),
    )
    body: dict[str, Any] = {"model": "blockrag", "query": "x", "input": "x"}
    body["messages"] = [{"role": "user", "content": "Who?"}]
    for _ in range(draw.randint(0, 4)):
        body[draw.choice(names)] = draw.choice(values)
    return "application/json", json.dumps(body).encode()


def _json_deep(make: Generator) -> tuple[str, bytes]:
    depth = make.draw.choice((50, 900, 20_000))
    return "application/json", b'{"messages":' + b"[" * depth + b"]" * make.draw.choice((0, depth)) + b"}"


def _form(make: Generator) -> tuple[str, bytes]:
    draw = make.draw
    name, options = make._text()[:200], draw.choice(('{"collection": "x"}', "{", "[]", make._text()[:100]))
    content = draw.choice((b"", b"text", draw.randbytes(2000), b"%PDF-1.7\n" + draw.randbytes(500)))
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="file"; filename="'
        + name.encode("utf-8", "replace")
        + b'"\r\n\r\n'
        + content
        + b"\r\n",
        b'--edge\r\nContent-Disposition: form-data; name="blockrag"\r\n\r\n'
        + options.encode("utf-8", "replace")
        + b"\r\n",
    ]
    draw.shuffle(parts)
    body = b"".join(parts[: draw.randint(0, 2)]) + draw.choice((b"--edge--\r\n", b"--edge", b""))
    return draw.choice(
        ("multipart/form-data; boundary=edge", "multipart/form-data", "multipart/form-data; boundary=")
    ), body


def _bytes(make: Generator) -> tuple[str, bytes]:
    return make.draw.choice(("text/plain", "application/octet-stream", "x")), make.draw.randbytes(300)


async def _exchange(host: str, port: int, data: bytes, *, slow: bool = False) -> tuple[int, bytes]:
    """Status, 0 where none came, and what was said."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return 502, str(error).encode()
    try:
        for start in range(0, len(data), max(1, len(data) // 3)) if slow else (0,):
            writer.write(data[start : start + max(1, len(data) // 3)] if slow else data)
            await writer.drain()
            await asyncio.sleep(0.1 if slow else 0)
        said = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3.0):
                while part := await reader.read(65_536):
                    said += part
    except OSError:
        return 0, b""
    finally:
        writer.close()
    first = said.split(b"\r\n", 1)[0].split(b" ")
    return (int(first[1]) if len(first) > 1 and first[1].isdigit() else 0), said


async def _several(count: int, one: Callable[[], Any]) -> None:
    """Runs it so many times, some at a time."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await one()

    await asyncio.gather(*(worker() for _ in range(AT_A_TIME)))


def replicas(system: LocalSystem) -> dict[str, tuple[int, float]]:
    """Of each process of the system that serves, by its name and place: its id and its own memory in MiB."""
    state = read_state(system.settings.state_path)
    if state is None:
        raise LookupError("the system does not run")
    found: dict[str, tuple[int, float]] = {}
    for pid, line in sorted(descendants(state.pid)):
        if not line.startswith(("ray::ServeReplica:", "ray::ProxyActor")) and "edge_worker" not in line:
            continue
        with contextlib.suppress(OSError):
            own = private_mib(pid)
            # Its title, without the method that it is in right now.
            name = line.split()[0].removeprefix("ray::").partition(".")[0] if line.startswith("ray::") else "index"
            found[f"{name}/{sum(key.startswith(name) for key in found)}"] = (pid, own)
    return found


async def attack(system: LocalSystem, requests: int, seed: int) -> Report:
    """All doors, one after another; afterwards the system must answer as before."""
    report = Report()
    await attack_grpc(system.target, requests, seed, report)
    await attack_http(system.http_url, requests, seed, report)
    async with BlockragClient(system.target) as client:
        await client.ingest_text("after", "The capital of Norway is Oslo.", collection="hostile")
        answer = await client.ask("What is the capital of Norway?", collection="hostile", max_tokens=4, timeout_s=60)
        if [each.document_id for each in answer.completion.citations] != ["after"]:
            report.bad.append(f"afterwards it cites {answer.completion.citations}")
        await client.delete_collection("hostile")
    return report


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000, help="to each service, and over HTTP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4, help="in which they are sent; memory is read after each")
    parser.add_argument("--bundle", default="", help="empty: the reader that ships")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalSystem.start(fault_settings(Path(folder) / "state", options.bundle), owned=True) as system,
    ):
        seen: list[dict[str, tuple[int, float]]] = []
        for number in range(options.rounds):
            started = time.monotonic()
            report = asyncio.run(attack(system, options.requests // options.rounds, options.seed + number))
            seen.append(replicas(system))
            summary = {service: dict(counter) for service, counter in report.answers.items()}
            print(json.dumps({"round": number, "seconds": round(time.monotonic() - started), "answers": summary}))
            for line in report.bad[:20]:
                print("BAD", line)
            print(json.dumps({"bad": len(report.bad), "requests": report.requests}), flush=True)
        for name in sorted({name for each in seen for name in each}):
            row = [each.get(name) for each in seen]
            replaced = len({each[0] for each in row if each}) > 1
            print(name, "replaced" if replaced else "", [round(each[1]) if each else None for each in row])


if __name__ == "__main__":
    main()
