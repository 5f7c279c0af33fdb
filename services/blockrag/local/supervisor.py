"""The process that owns Ray and the applications on this machine.

Run by ``LocalSystem.start``. It stays until SIGTERM or SIGINT, then shuts Serve and its own Ray down. Where Ray's GCS
or raylet ends meanwhile it starts everything anew.
HAProxy's files are of that time: all of them go when it ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

from blockrag.errors import UnavailableError
from blockrag.local.again import become, end_others
from blockrag.local.copies import Job, Origin, launched_by, start_origin, work
from blockrag.local.inert import LIGHT, WHOLE, check_inert, import_inert
from blockrag.local.scratch import (
    close_doors,
    haproxy_environment,
    make_scratch,
    origin_address,
    remove_scratch,
    worker_launcher,
)
from blockrag.local.state import SystemState, own_state, write_state
from blockrag.services import GRPC_SERVICER_FUNCTION, SERVICES
from blockrag.settings import Settings, load_settings

_POLL_S = 0.2
_LAST_ANSWERS_S = 10.0
"""For what was begun when the system is told to stop."""
_VITAL = ("gcs_server", "raylet")
"""Ray's processes that are neither replaced nor done without."""

_LOGGER = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Runs the system until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m blockrag.local.supervisor")
    parser.add_argument("--settings", required=True)
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when the starting process is gone")
    options = parser.parse_args(arguments)
    settings = load_settings(options.settings)
    environment = dict(os.environ)
    make_scratch(settings)
    if settings.cluster.ha_proxy:
        os.environ.update(haproxy_environment(settings))  # which Serve reads when it is imported
    stop = threading.Event()
    _stop_on_signals(stop)
    origin: Origin | None = None
    if settings.cluster.copy_workers:
        # Before there are threads, connections or handlers of logs, which no copy should have.
        import_inert(LIGHT)
        made = start_origin(origin_address(settings), _prepare_origin)
        if isinstance(made, Job):
            work(made)
            return 0
        origin = made
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if options.until_stdin_closes:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    state = own_state(settings.cluster.target)
    try:
        return _Supervisor(settings, options.settings, state, origin).run(stop)
    except _RayEndedError:
        remove_scratch(settings)
        if stop.is_set():  # told to stop meanwhile
            write_state(settings.state_path, state.with_phase("stopped"))
            return 0
        become("blockrag.local.supervisor", sys.argv[1:] if arguments is None else arguments, environment)
        raise


def _prepare_origin() -> None:
    import_inert(WHOLE)
    check_inert()


def _stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


def _stop_at_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    stop.set()


class _RayEndedError(Exception):
    """A process that Ray cannot be without has ended, and everything else of it was ended."""


class _Supervisor:
    def __init__(self, settings: Settings, settings_file: str, state: SystemState, origin: Origin | None) -> None:
        self._settings = settings
        self._settings_file = settings_file
        self._state = state
        self._origin = origin

    def run(self, stop: threading.Event) -> int:
        import ray
        from ray import serve

        status = 0
        try:
            self._report("starting Ray")
            ray_address = self._start_ray()
            # Ray put a handler of its own in the place of ours, which ends the process where it stands.
            _stop_on_signals(stop)
            self._report("starting Serve")
            self._start_serve()
            self._report("starting the applications")
            self._start_applications(stop)
            if not stop.is_set():
                started = replace(self._state, ray_address=ray_address, metrics_url=_metrics_url())
                self._state = started.with_phase("ready")
                write_state(self._settings.state_path, self._state)
            while not stop.wait(_POLL_S):
                self._see_that_ray_runs()
            final = self._state.with_phase("stopped")
        except _RayEndedError:
            raise
        except SystemExit:
            # Ray's handler, between its start and ours.
            final = self._state.with_phase("stopped")
        except Exception as error:
            _LOGGER.exception("start failed")
            final = self._state.with_phase("failed", detail=_first_line(error))
            status = 1
        # The next stop signal must not cut the shutdown short: it would leave Ray's processes behind.
        close_doors(self._settings, _LAST_ANSWERS_S)
        if ray.is_initialized():
            try:
                serve.shutdown()
            except Exception:
                _LOGGER.exception("Serve did not shut down cleanly")
            ray.shutdown()
        if self._origin is not None:
            self._origin.stop()
        remove_scratch(self._settings)
        write_state(self._settings.state_path, final)
        return status

    def _see_that_ray_runs(self) -> None:
        """Raises ``_RayEndedError``."""
        from ray._private import worker

        ended = [kind for kind, _ in worker._global_node.dead_processes() if kind in _VITAL]
        if ended:
            self._report(f"Ray's {ended[0]} has ended: starting again")
            end_others()
            raise _RayEndedError

    def _report(self, detail: str) -> None:
        _LOGGER.info(detail)
        self._state = self._state.with_phase("starting", detail)
        write_state(self._settings.state_path, self._state)

    def _start_ray(self) -> str:
        import ray

        with nullcontext() if self._origin is None else launched_by(worker_launcher(self._settings)):
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


def _metrics_url() -> str:
    import ray

    (node,) = ray.nodes()
    return f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
