"""Start, find and stop the local system."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from blockrag.errors import EnvironmentSetupError, NotFoundError, SettingsError, UnavailableError
from blockrag.local.preflight import check_machine, serve_port_environment
from blockrag.local.state import SystemState, read_state
from blockrag.modeling.cache import CACHE_VARIABLE
from blockrag.settings import ENVIRONMENT_PREFIX, Settings, host_and_port, load_settings

SERVICE_ENVIRONMENT = {
    # A leaked reference would keep its object for the life of the process: make it an exception.
    "RAY_allow_out_of_band_object_ref_serialization": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Requests, routing and our code in one event loop per replica: each hand-over between threads that it saves is a
    # wake-up. What computes has threads of its own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Threads that spin while they wait take the cores from the other services: at 4,096 cached tokens on two busy
    # cores, 411 ms to the first token against 70.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    # Between replicas: the passages of the largest document are one message, and Serve's 4 MiB are not enough for it.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
}
"""Environment of every service's process, wherever it runs; the image sets the same."""

_SETTINGS_FILE = "settings.yaml"
_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 120.0
_POLL_S = 0.1


class LocalSystem:
    """A running system on this machine.

    As a context manager it stops on leaving. The work is done by a supervisor process of its own, which owns Ray: it
    goes on when the starting process ends, and stopping it ends just the processes that it started.
    """

    def __init__(self, settings: Settings, state: SystemState, process: subprocess.Popen[bytes] | None = None) -> None:
        self.settings = settings
        self._state = state
        self._process = process

    @property
    def target(self) -> str:
        """gRPC address, host:port."""
        return self._state.target

    @property
    def http_url(self) -> str:
        """Base URL for clients of OpenAI's API, by the settings."""
        return f"http://{host_and_port(self.settings.cluster.host, self.settings.cluster.http_port)}/v1"

    @property
    def ray_address(self) -> str:
        """Address for other Ray drivers on this machine."""
        return self._state.ray_address

    @property
    def metrics_url(self) -> str:
        """Where Prometheus scrapes the services' metrics, on this machine."""
        return self._state.metrics_url

    @classmethod
    def start(
        cls, settings: Settings, on_progress: Callable[[str], None] | None = None, *, owned: bool = False
    ) -> LocalSystem:
        """Starts the system and waits until every application answers.

        ``owned``: it also stops when the calling process ends, however that ends. Raises ``EnvironmentSetupError``
        when the machine is not ready and ``UnavailableError`` when an application does not come up; then nothing is
        left running.
        """
        check_machine(settings)
        state_path = settings.state_path
        (state_path / "logs").mkdir(parents=True, exist_ok=True)
        settings_file = state_path / _SETTINGS_FILE
        # The file holds API keys and the cache's secret.
        settings_file.touch(mode=0o600)
        settings_file.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        log_file = state_path / "logs" / "supervisor.log"
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "blockrag.local.supervisor", "--settings", str(settings_file)),
                    *(("--until-stdin-closes",) if owned else ()),
                ],
                stdin=subprocess.PIPE if owned else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_supervisor_environment(settings),
                start_new_session=True,
            )
        try:
            state = _wait_until_ready(process, state_path, log_file, on_progress)
        except BaseException:
            _terminate(process.pid, process.poll)
            raise
        # Kept with the system: the pipe that an owned supervisor watches must stay open as long as this process runs.
        return cls(settings, state, process)

    @classmethod
    def attach(cls, settings: Settings) -> LocalSystem:
        """The system that runs already, with the settings that it was started with; ``settings`` say where it is.

        Raises ``NotFoundError`` when none does.
        """
        state = read_state(settings.state_path)
        if state is None or not state.alive:
            raise NotFoundError("nothing is running: start it with 'blockrag up'")
        try:
            running = load_settings(settings.state_path / _SETTINGS_FILE, {})
        except SettingsError:  # another version's: it is to be found, and stopped, all the same
            running = settings
        return cls(running, state)

    def stop(self) -> None:
        """Stops the system; returns when its processes are gone."""
        _terminate(self._state.pid, lambda: None if self._state.alive else 0)
        if self._process is not None:
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def __enter__(self) -> LocalSystem:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def ray_token_environment(settings: Settings) -> dict[str, str]:
    """What a Ray driver needs in its environment to talk to the local system's Ray.

    Ray's own ports are bound to all addresses whatever it is told, so they ask for a token.
    """
    token_file = settings.state_path / "ray-token"
    if not token_file.exists():
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32), encoding="ascii")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def _supervisor_environment(settings: Settings) -> dict[str, str]:
    environment = {
        # The settings file has the variables' values already, or what the starting program put in their place.
        **{
            name: value
            for name, value in os.environ.items()
            if name == CACHE_VARIABLE or not name.startswith(ENVIRONMENT_PREFIX)
        },
        **ray_token_environment(settings),
        **serve_port_environment(),
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if settings.cluster.ha_proxy else "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Serve's default, 10 s and three times, leaves a dead HAProxy to the standby for half a minute.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # On a busy machine a proxy takes longer than Serve's 5 s to start, and a start would fail for that.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Ray would start workers of no job ahead of time, which are no copies of ours.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        **SERVICE_ENVIRONMENT,
        # numpy's library of products starts threads when it is imported, and nobody uses them.
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("RAY_ADDRESS", None)
    return environment


def _wait_until_ready(
    process: subprocess.Popen[bytes], state_path: Path, log_file: Path, on_progress: Callable[[str], None] | None
) -> SystemState:
    deadline = time.monotonic() + _START_TIMEOUT_S
    reported = ""
    while time.monotonic() < deadline:
        state = read_state(state_path)
        if state is not None and state.pid == process.pid:
            if state.phase == "ready":
                return state
            if state.phase == "failed":
                raise UnavailableError(f"{state.detail} (log: {log_file})")
            if on_progress is not None and state.detail != reported:
                reported = state.detail
                on_progress(reported)
        if process.poll() is not None:
            raise UnavailableError(f"the supervisor ended with status {process.returncode} (log: {log_file})")
        time.sleep(_POLL_S)
    raise UnavailableError(f"the system was not ready after {_START_TIMEOUT_S:.0f} s (log: {log_file})")


def _terminate(pid: int, poll: Callable[[], int | None]) -> None:
    """Asks a process to end and waits for it; poll returns None while it runs."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if poll() is not None:
            return
        time.sleep(_POLL_S)
    raise EnvironmentSetupError(f"process {pid} did not stop within {_STOP_TIMEOUT_S:.0f} s")
