"""Which system a command talks to."""

from __future__ import annotations

from pathlib import Path

from blockrag.cli import console
from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.tenants import HASHED_KEY

_PATIENCE_S = 3.0
"""For a target that somebody typed, which may be wrong: shorter than a program's."""


def connect(settings_path: Path | None, target: str, api_key: str) -> BlockragClient:
    """A client of ``target``, or of the system on this machine when that is empty.

    Raises ``NotFoundError`` when nothing runs here. On this machine the first tenant's key is used by itself.
    """
    if target:
        return BlockragClient(target, api_key=api_key or None, patience_s=_PATIENCE_S)
    settings = console.settings_from(settings_path)
    system = LocalSystem.attach(settings)
    tenants = settings.gateway.tenants or system.settings.gateway.tenants
    keys = [key for tenant in tenants[:1] for key in tenant.keys if not key.startswith(HASHED_KEY)]
    return BlockragClient(system.target, api_key=api_key or next(iter(keys), None))
