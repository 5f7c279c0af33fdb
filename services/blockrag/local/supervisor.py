"""The process that owns the system on this machine.

Run by ``LocalSystem.start``. It stays until SIGTERM or SIGINT. Ray and the applications are a child's
(``ray_life.py``), which shuts them down; where Ray's GCS or raylet ends, or the child, everything but the origin is
ended and another child starts it anew. HAProxy's files are of that time: all of them go when it ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading

from blockrag.local.copies import Job, Origin, start_origin, work
from blockrag.local.inert import LIGHT, WHOLE, check_inert, import_inert
from blockrag.local.lives import AGAIN, Lives, end_others
from blockrag.local.ray_life import System, stop_on_signals
from blockrag.local.scratch import (
    clear_scratch,
    haproxy_environment,
    make_scratch,
    origin_address,
    remove_scratch,
)
from blockrag.local.state import SystemState, own_state, read_state, write_state
from blockrag.settings import Settings, load_settings

_MOST_VAIN = 5
"""Lives in a row that end before everything runs: the next one would too."""

_LOGGER = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Runs the system until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m blockrag.local.supervisor")
    parser.add_argument("--settings", required=True)
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when the starting process is gone")
    options = parser.parse_args(arguments)
    settings = load_settings(options.settings)
    make_scratch(settings)
    if settings.cluster.ha_proxy:
        os.environ.update(haproxy_environment(settings))  # which Serve reads when it is imported
    stop = threading.Event()
    stop_on_signals(stop)
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
    state = own_state(settings.cluster.target)
    system = System(settings, options.settings, state, copied=origin is not None)
    lives = Lives(lambda: system.run(stop), stop, while_input=options.until_stdin_closes)
    try:
        return _live(lives, settings, state, origin, stop)
    finally:
        if origin is not None:
            origin.stop()
        remove_scratch(settings)


def _prepare_origin() -> None:
    import_inert(WHOLE)
    check_inert()


def _live(lives: Lives, settings: Settings, state: SystemState, origin: Origin | None, stop: threading.Event) -> int:
    """One life after another, until one ends by itself. Returns its status."""
    vain = 0
    while True:
        status = lives.one()
        if status != AGAIN and status >= 0:
            return status
        last = read_state(settings.state_path)
        end_others(() if origin is None else (origin.pid,))
        clear_scratch(settings)
        if stop.is_set():  # told to stop meanwhile
            write_state(settings.state_path, state.with_phase("stopped"))
            return 0
        ended = "Ray has ended" if status == AGAIN else f"the process that has Ray was ended by signal {-status}"
        vain = 0 if last is not None and last.phase == "ready" else vain + 1
        if vain == _MOST_VAIN:
            detail = f"{ended} {vain} times before everything ran"
            _LOGGER.error(detail)
            write_state(settings.state_path, state.with_phase("failed", detail))
            return 1
        _LOGGER.warning("%s: starting again", ended)
        write_state(settings.state_path, state.with_phase("starting", f"{ended}: starting again"))


if __name__ == "__main__":
    sys.exit(main())
