"""What the commands that measure share: a system of their own, a bar, lists of numbers, result files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockrag.cli import console
from blockrag.errors import SetupError
from blockrag.local import LocalSystem
from blockrag.local.preflight import free_port
from blockrag.settings import Settings

WITHOUT_KEYS: Mapping[str, Any] = {"tenants": (), "tenants_file": ""}
"""Of ``gateway``, for a system that only the command itself asks."""


def own_settings(settings: Settings, state_dir: Path, budget_mb: int = 0, **sections: Mapping[str, Any]) -> Settings:
    """The settings with ports of their own on this machine, and index and blocks below a state directory of their own,
    so that a system in use, its index, its blocks and its volume are left alone.

    ``budget_mb``: of a cache in an object store that holds it; 0: as it is set. ``sections`` are further changes.
    """
    changes: dict[str, dict[str, Any]] = {
        "cluster": {
            "host": "127.0.0.1",
            "state_dir": str(state_dir.resolve()),
            "grpc_port": free_port(),
            "http_port": free_port(),
        },
        "retriever": {"path": ""},
        "kv_cache": {"disk_path": "", "volume": ""},
    }
    if budget_mb:
        changes["cluster"]["object_store_mb"] = max(settings.cluster.object_store_mb, budget_mb * 3 // 2)
        changes["kv_cache"]["budget_mb"] = budget_mb
    for name, values in sections.items():
        changes.setdefault(name, {}).update(values)
    update = {name: getattr(settings, name).model_copy(update=values) for name, values in changes.items()}
    return settings.model_copy(update=update)


@contextmanager
def own_system(settings: Settings) -> Iterator[LocalSystem]:
    """A system that is started for the body, with a line that says how far it is."""
    with console.err.status("starting") as line:
        system = LocalSystem.start(settings, on_progress=line.update, owned=True)
    with system:
        yield system


@contextmanager
def counted(what: str = "") -> Iterator[Callable[..., None]]:
    """A bar: what it gives takes ``done``, ``total`` and ``what``, those that have changed."""
    with console.progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done=None, total=None, what=None: bar.update(task, completed=done, total=total, description=what)


def parse_numbers(text: str, option: str, most: int, least: int = 1) -> tuple[int, ...]:
    """Distinct numbers of ``least`` to ``most``, ascending, from a list separated by commas. Raises ``SetupError``."""
    numbers = sorted(parse_rates(text, option))
    if any(number % 1 for number in numbers):
        raise SetupError(f"{option} {text!r}: write whole numbers")
    if any(not least <= number <= most for number in numbers):
        raise SetupError(f"{option} {text!r}: each number must be {least} to {most}")
    return tuple(map(int, numbers))


def parse_rates(text: str, option: str) -> tuple[float, ...]:
    """Distinct numbers from a list separated by commas, in its order. Raises ``SetupError``."""
    try:
        return tuple(dict.fromkeys(map(float, names(text))))
    except ValueError as error:
        raise SetupError(f"{option} {text!r}: write numbers separated by commas") from error


def names(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def environment() -> dict[str, Any]:
    """Where it was measured, for a result's JSON."""
    from blockrag.evaluation.experiment import describe_environment

    return asdict(describe_environment())


def as_bytes(value: Any) -> bytes:
    """A result's JSON, as a file has it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_results(out: Path, files: Mapping[str, bytes]) -> None:
    """Write result files together and say where they are."""
    from blockrag.evaluation.experiment import write_together

    write_together(out, files)
    console.err.print(f"written: {', '.join(str(out / name) for name in files)}", soft_wrap=True)
