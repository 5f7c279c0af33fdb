"""One life of Ray and the applications on this machine, in the process that starts them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import nullcontext
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

from blockrag.errors import UnavailableError
from blockrag.local.copies import launched_by
from blockrag.local.lives import AGAIN
from blockrag.local.scratch import close_doors, worker_launcher
from blockrag.local.state import SystemState, write_state
from blockrag.services import GRPC_SERVICER_FUNCTION, SERVICES
from blockrag.settings import Settings

_POLL_S = 0.2
_LAST_ANSWERS_S = 10.0
"""For what was begun when the system is told to stop."""
_VITAL = ("gcs_server", "raylet")
"""Ray's processes that are neither replaced nor done without."""

_LOGGER = logging.getLogger(__name__)


def stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


class System:
    """Ray, Serve and the applications."""

    def __init__(self, settings: Settings, settings_file: str, state: SystemState, *, copied: bool) -> None:
        """``copied``: there is an origin, of which Ray's workers are to be copies."""
        self._settings = settings
        self._settings_file = settings_file
        self._state = state
        self._copied = copied

    def run(self, stop: threading.Event) -> int:
        """Until ``stop`` is set. Returns an exit status. Ends the process, with ``AGAIN``, when one of Ray's has ended
        that it cannot be without, at whatever is being done; what is left of Ray runs then."""
        import ray
        from ray import serve

        status, over = 0, threading.Event()
        try:
            self._report("starting Ray")
            ray_address = self._start_ray()
            threading.Thread(target=_end_with_ray, args=(over,), daemon=True).start()
            # Ray put a handler of its own in the place of ours, which ends the process where it stands.
            stop_on_signals(stop)
            self._report("starting Serve")
            self._start_serve()
            self._report("starting the applications")
            self._start_applications(stop)
            if not stop.is_set():
                started = replace(self._state, ray_address=ray_address, metrics_url=_metrics_url())
                self._state = started.with_phase("ready")
                write_state(self._settings.state_path, self._state)
            stop.wait()
            final = self._state.with_phase("stopped")
        except SystemExit:
            # Ray's handler, between its start and ours.
            final = self._state.with_phase("stopped")
        except Exception as error:
            if ray.is_initialized():
                _end_if_ray_has()  # which is the reason then
            _LOGGER.exception("start failed")
            final = self._state.with_phase("failed", detail=_first_line(error))
            status = 1
        # The next stop signal must not cut the shutdown short: it would leave Ray's processes behind.
        over.set()
        close_doors(self._settings, _LAST_ANSWERS_S)
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

        with launched_by(worker_launcher(self._settings)) if self._copied else nullcontext():
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

        cluster = self._settings.cluster
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=cluster.host, port=cluster.http_port),
            grpc_options=gRPCOptions(port=cluster.grpc_port, grpc_servicer_functions=[GRPC_SERVICER_FUNCTION]),
            logging_config={"encoding": "JSON", "log_level": self._settings.telemetry.log_level},
        )

    def _start_applications(self, stop: threading.Event) -> None:
        from ray import serve
        from ray.serve.api import RunTarget

        arguments = {"settings_file": self._settings_file}
        # Together: most of a replica's start is importing, and they wait for each other only at the first request.
        serve.run_many(
            [
                RunTarget(resolve_name(service.import_path)(arguments), name=service.name, route_prefix=service.route)
                for service in SERVICES
            ],
            wait_for_applications_running=False,
        )
        # Serve would wait for them too, deaf to a signal to stop.
        while not stop.wait(_POLL_S):
            found = serve.status().applications
            for name, application in found.items():
                if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise UnavailableError(f"{name}: {application.message}")
            if {name for name, application in found.items() if application.status == "RUNNING"} >= {
                service.name for service in SERVICES
            }:
                return


def _end_with_ray(over: threading.Event) -> None:
    """Until it is over. In a thread of its own: calls of Ray's do not return when its raylet is gone."""
    while not over.wait(_POLL_S):
        _end_if_ray_has()


def _end_if_ray_has() -> None:
    from ray._private import worker

    ended = [kind for kind, _ in worker._global_node.dead_processes() if kind in _VITAL]
    if ended:
        _LOGGER.error("Ray's %s has ended", ended[0])
        logging.shutdown()
        os._exit(AGAIN)


def _metrics_url() -> str:
    import ray

    (node,) = ray.nodes()
    return f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
