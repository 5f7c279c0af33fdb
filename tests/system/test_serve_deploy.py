"""The way a cluster deploys: `serve deploy` of the configuration that KubeRay embeds, on a Ray of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockrag.client import BlockragClient
from blockrag.errors import BlockragError
from blockrag.local.preflight import free_port
from blockrag.results import Answer
from tests.system.nodes import deploy
from tests.unit.deploy.files import CLUSTER, read_yaml, serve_config

_BIN = Path(sys.executable).parent


@pytest.mark.own_cluster
@pytest.mark.timeout(500)
def test_the_local_configuration_serves_a_question(tmp_path: Path) -> None:
    settings = read_yaml(CLUSTER / "settings" / "local.yaml")
    settings.setdefault("cluster", {})["state_dir"] = str(tmp_path / "state")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    config: dict[str, Any] = serve_config("local")
    config["grpc_options"]["port"] = free_port()
    config["http_options"]["port"] = free_port()
    for application in config["applications"]:
        application["args"]["settings_file"] = str(tmp_path / "settings.yaml")
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        **_exports(),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    }
    dashboard = free_port()
    address = f"http://127.0.0.1:{dashboard}"
    with _ray(dashboard, environment) as ray:
        deploy(tmp_path / "serve.yaml", address, environment, ray)
        answer = asyncio.run(_answer(f"127.0.0.1:{config['grpc_options']['port']}", ray))
        subprocess.run([_BIN / "serve", "shutdown", "-y", "--address", address], env=environment, check=True)
    assert answer.text
    assert [citation.title for citation in answer.completion.citations] == ["Fiji"]


def _exports() -> dict[str, str]:
    """The variables that the file's own instructions set."""
    lines = [line for line in (CLUSTER / "local.yaml").read_text().splitlines() if line.startswith("#   export ")]
    assert len(lines) == 3
    return dict(pair.split("=") for line in lines for pair in line.removeprefix("#   export ").split())


async def _answer(target: str, ray: subprocess.Popen[bytes]) -> Answer:
    async with BlockragClient(target) as client:
        await _ingest(client, ray)
        return await client.ask("What is the capital of Fiji?", collection="notes")


async def _ingest(client: BlockragClient, ray: subprocess.Popen[bytes]) -> None:
    """Once all applications run: until then calls are refused."""
    deadline = time.monotonic() + 300
    while True:
        try:
            await client.ingest_text("fiji", "The capital of Fiji is Suva.", title="Fiji", collection="notes")
            await client.ask("Is it up?", collection="notes", max_tokens=1)
            return
        except BlockragError:
            if time.monotonic() > deadline or ray.poll() is not None:
                raise
            await asyncio.sleep(1)


@contextmanager
def _ray(dashboard: int, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A head node in a process group of its own."""
    command = [str(_BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}"]
    command += [f"--dashboard-port={dashboard}", "--num-cpus=8", f"--object-store-memory={2**28}"]
    # By default workers take the ports from 10002 to 19999, which free_port may have given away.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    # Fixed ones by default, which a Ray that is just going may still hold: the node would end at once.
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    with subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL) as ray:
        try:
            yield ray
        finally:
            os.killpg(ray.pid, signal.SIGTERM)
            try:
                ray.wait(90)  # it drains the node for up to half a minute
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(ray.pid, signal.SIGKILL)
