"""The process file: what ``blockrag up`` started, so that later commands find and stop exactly that."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from blockrag.errors import DataError
from blockrag.modeling.files import replace_file

Phase = Literal["starting", "ready", "failed", "stopped"]


@dataclass(frozen=True)
class SystemState:
    """One run of the local system."""

    pid: int
    """Supervisor's process id."""
    started_ticks: int
    """Its start time in clock ticks since boot: tells it from a later process with the same id."""
    target: str
    """gRPC address, host:port."""
    ray_address: str = ""
    """Address of the Ray cluster, for drivers on this machine."""
    metrics_url: str = ""
    """Where Ray exports the services' metrics for Prometheus."""
    phase: Phase = "starting"
    detail: str = ""
    """What it is doing, or why it failed."""

    @property
    def alive(self) -> bool:
        """Whether the supervisor still runs."""
        return process_start_ticks(self.pid) == self.started_ticks

    def with_phase(self, phase: Phase, detail: str = "") -> SystemState:
        """The same run in another phase."""
        return replace(self, phase=phase, detail=detail)


def state_file(state_path: Path) -> Path:
    """Where the process file is."""
    return state_path / "system.json"


def write_state(state_path: Path, state: SystemState) -> None:
    """Writes the process file so that a reader never sees half of it."""
    state_path.mkdir(parents=True, exist_ok=True)
    replace_file(state_file(state_path), json.dumps(asdict(state), indent=2))


def read_state(state_path: Path) -> SystemState | None:
    """The last run, or None when there was none.

    Raises ``DataError`` when the file cannot be understood.
    """
    path = state_file(state_path)
    try:
        return SystemState(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"process file {path}: {error}; remove it if nothing runs") from error


def process_start_ticks(pid: int) -> int:
    """Start time of a process in ticks since boot; -1 when it does not run or only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return -1
    # The command name may hold spaces and brackets: fields are counted from behind it.
    fields = text[text.rindex(")") + 2 :].split()
    return -1 if fields[0] == "Z" else int(fields[19])


def own_state(target: str) -> SystemState:
    """A fresh state for the calling process."""
    pid = os.getpid()
    return SystemState(pid=pid, started_ticks=process_start_ticks(pid), target=target)
