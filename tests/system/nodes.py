"""Machines in network namespaces: each is a Ray node with addresses and ports of its own, on wires that can be cut.

``python -m tests.system.nodes`` asks two decoders on two machines, by blocks and by load, and prints what moved between
them and how long the first token took. tests/system/test_nodes.py has machines vanish. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from blockrag.client import BlockragClient
from blockrag.local.haproxy import write_node_wrapper
from blockrag.settings import Settings
from tests.unit.deploy.files import REPOSITORY, serve_config

_BIN = Path(sys.executable).parent
_DASHBOARD = 8265
_GCS = 6379
_START_S = 120
_DEATH_S = 10
_CPUS = 8
_WORDS = ("bridges", "mills", "schools", "boats", "orchards", "towers", "markets", "wells")


def allowed() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"br{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def image_environment() -> dict[str, str]:
    """What the image sets for every process of it, of Ray's and of Serve's."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    stage = text[text.rindex("ENV PATH") :]
    return dict(re.findall(r"^\s+((?:RAY_|OMP_|TOKENIZERS_|HF_)\w+)=(\S+)", stage, re.MULTILINE))


@dataclass
class Node:
    """A machine: a namespace, its end of a wire, and Ray in it."""

    name: str
    address: str
    ray: subprocess.Popen[bytes] | None = None

    @property
    def wire(self) -> str:
        """The other end of its wire, on this machine."""
        return f"{self.name}w"

    @property
    def target(self) -> str:
        """Where its proxy answers gRPC."""
        return f"{self.address}:9000"

    def cut(self) -> None:
        """Takes its wire out."""
        _ip("link", "set", self.wire, "down")

    def mend(self) -> None:
        """Puts it back."""
        _ip("link", "set", self.wire, "up")

    def received_bytes(self) -> int:
        """Over its wire, from all others, since it was made."""
        return int(Path(f"/sys/class/net/{self.wire}/statistics/tx_bytes").read_text())

    def processes(self) -> list[int]:
        """Everything that runs on it."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def die(self) -> None:
        """As a machine does whose power goes: no process of it says goodbye."""
        self.cut()
        until = time.monotonic() + _DEATH_S
        while (running := self.processes()) and time.monotonic() < until:  # some are started meanwhile
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert self.ray is not None
        self.ray.wait(30)
        self.ray = None


@dataclass
class Machines:
    """The head and the workers, on one bridge."""

    folder: Path
    environment: Mapping[str, str]
    nodes: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        """Runs no replica but those that ask for ``index``."""
        return self.nodes[0]

    @property
    def workers(self) -> list[Node]:
        """The others."""
        return self.nodes[1:]

    @property
    def dashboard(self) -> str:
        """Of the head, where Serve is told what to run."""
        return f"http://{self.head.address}:{_DASHBOARD}"

    def start(self, node: Node, object_store_mb: int = 256) -> None:
        """Starts Ray on a machine and waits for it; the first is the head."""
        store = object_store_mb * 2**20
        command = ["ip", "netns", "exec", node.name, str(_BIN / "ray"), "start", "--block"]
        command += [f"--node-ip-address={node.address}", f"--object-store-memory={store}"]
        if node is self.head:
            command += ["--head", f"--port={_GCS}", "--num-cpus=0", '--resources={"index": 1}']
            command += ["--dashboard-host=0.0.0.0", f"--dashboard-port={_DASHBOARD}", f"--temp-dir={self.folder}/ray"]
        else:
            command += [f"--address={self.head.address}:{_GCS}", f"--num-cpus={_CPUS}"]
        # In containers each machine has a /tmp of its own.
        files = self.folder / node.name
        files.mkdir(exist_ok=True)
        environment = os.environ | {
            **self.environment,
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(self.folder / "haproxy"),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "a"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "m"),
        }
        said = files / "ray.log"
        with said.open("wb") as log:
            node.ray = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)
        # One after another: they share a folder for their sockets, and two that start at once choose the same names.
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in said.read_text():
            assert node.ray.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.2)

    def deploy(self, file: Path) -> None:
        """``serve deploy`` on the head."""
        assert self.head.ray is not None
        deploy(file, self.dashboard, self.environment, self.head.ray)

    def replicas(self) -> dict[str, list[str]]:
        """Of each deployment, the addresses of the machines on which its running replicas are."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/serve/applications/",
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            applications = json.load(answer)["applications"]
        return {
            name: sorted(replica["node_ip"] for replica in deployment["replicas"] if replica["state"] == "RUNNING")
            for application in applications.values()
            for name, deployment in application["deployments"].items()
        }

    def wait(self, until: Callable[[dict[str, list[str]]], bool], seconds: float = 240.0) -> float:
        """Until the replicas are as they should be; returns how long it took."""
        began = time.monotonic()
        while True:
            with suppress(OSError, KeyError):
                replicas = self.replicas()
                if until(replicas):
                    return time.monotonic() - began
            assert time.monotonic() - began < seconds, replicas
            time.sleep(0.5)


def deploy(file: Path, dashboard: str, environment: Mapping[str, str], ray: subprocess.Popen[bytes]) -> None:
    """``serve deploy``, again and again until the dashboard answers. ``ray``: the head, which must stay."""
    deadline = time.monotonic() + _START_S
    command = [str(_BIN / "serve"), "deploy", "--address", dashboard, str(file)]
    while True:
        done = subprocess.run(command, env=os.environ | {**environment}, capture_output=True, text=True)
        if done.returncode == 0:
            return
        assert ray.poll() is None, "Ray did not start"
        assert time.monotonic() < deadline, done.stderr


@contextmanager
def machines(workers: int, environment: Mapping[str, str] | None = None) -> Iterator[Machines]:
    """So many beside the head, with addresses, without Ray; everything that is left of them is ended and removed."""
    # Ray's sockets are below it, and a socket's path has 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="br-"))
    own = {"RAY_raylet_start_wait_time_s": "120", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    prefix, net = f"br{os.getpid() % 10_000:04}", f"10.{os.getpid() % 200 + 50}.0"
    bridge = f"{prefix}b"
    made = Machines(folder, image_environment() | own | dict(environment or {}))
    try:
        write_node_wrapper(folder / "haproxy")
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(1 + workers):
            node = Node(f"{prefix}n{number}", f"{net}.{10 + number}")
            _ip("netns", "add", node.name)
            made.nodes.append(node)
            _ip("link", "add", node.wire, "type", "veth", "peer", "name", "eth0", "netns", node.name)
            _ip("link", "set", node.wire, "master", bridge, "up")
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.name, "link", "set", "eth0", "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield made
    finally:
        for node in made.nodes:
            if node.ray is not None:
                node.die()
            for named in (("link", "del", node.wire), ("netns", "del", node.name)):
                subprocess.run(["ip", *named], check=False, capture_output=True)  # not all of it may be there
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def write_config(folder: Path, settings: Settings) -> Path:
    """cluster/cluster.yaml with these settings, the retriever where its index is."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
    config: dict[str, Any] = serve_config("cluster")
    for application in config["applications"]:
        application["args"]["settings_file"] = str(file)
        if application["name"] == "retriever":
            options = {"num_cpus": 0, "resources": {"index": 1}}
            application["deployments"] = [{"name": "Retriever", "ray_actor_options": options}]
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    return folder / "serve.yaml"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


async def _store(target: str, documents: int) -> None:
    """Documents, and their blocks in the object store."""
    draw = random.Random(0)
    async with BlockragClient(target, timeout_s=60) as client:
        for number in range(documents):
            words = " ".join(f"{draw.choice(_WORDS)} {draw.randrange(1000)}" for _ in range(40))
            await client.ingest_text(str(number), f"Town {number} has {words}.", title=f"Town {number}")
        async for _ in client.warm():
            pass


async def _ask(target: str, documents: int, seconds: float, per_second: float) -> dict[str, float]:
    """Questions about documents drawn by Zipf's law, in open loop."""
    draw = random.Random(1)
    weights = [1 / (1 + place) for place in range(documents)]
    async with BlockragClient(target, timeout_s=60) as client:

        async def one(number: int) -> float:
            answer = await client.ask(f"What has Town {number}?", top_k=5, max_tokens=8)
            return answer.completion.time_to_first_token_ms

        tasks = []
        for _ in range(int(seconds * per_second)):
            tasks.append(asyncio.create_task(one(draw.choices(range(documents), weights)[0])))
            await asyncio.sleep(1 / per_second)
        times = sorted(await asyncio.gather(*tasks))
    return {"p50_ms": round(times[len(times) // 2], 1), "p95_ms": round(times[len(times) * 95 // 100], 1)}


def main() -> None:
    """Both ways of routing, one after another, each on machines of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", default="", help="empty: the reader that ships")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--per-second", type=float, default=2.0)
    parser.add_argument("--l1-mb", type=int, default=64, help="of each decoder; what all documents take is more")
    options = parser.parse_args()
    for routing in ("blocks", "load"):
        with machines(2) as made:
            settings = Settings.model_validate(
                {
                    "bundle": {"path": options.bundle},
                    "cluster": {"host": "0.0.0.0", "state_dir": str(made.folder / "state")},
                    "kv_cache": {"budget_mb": 384, "disk_mb": 0},
                    "decoder": {"replicas": 2, "threads": 1, "l1_mb": options.l1_mb, "routing": routing},
                }
            )
            file = write_config(made.folder, settings)
            for node in made.nodes:
                made.start(node, 640)
            made.deploy(file)
            made.wait(lambda found: "Http" in found and all(found.values()) and len(found["Decoder"]) == 2)
            decoders = [node for node in made.workers if node.address in made.replicas()["Decoder"]]
            asyncio.run(_store(made.head.target, options.documents))
            before = sum(node.received_bytes() for node in decoders)
            times = asyncio.run(_ask(made.head.target, options.documents, options.seconds, options.per_second))
            moved = sum(node.received_bytes() for node in decoders) - before
            print(json.dumps({"routing": routing, **times, "moved_mib": round(moved / 2**20, 1)}), flush=True)


if __name__ == "__main__":
    main()
