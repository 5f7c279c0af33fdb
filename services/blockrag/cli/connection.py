"""Which system a command talks to."""

from __future__ import annotations

from dataclasses import dataclass

from blockrag.cli import console
from blockrag.cli.console import ApiKeyOption, SettingsOption, TargetOption
from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.results import Description
from blockrag.tenants import HASHED_KEY

_PATIENCE_S = 3.0
"""For a target that somebody typed, which may be wrong: shorter than a program's."""


@dataclass(frozen=True)
class Connection:
    """Options of every command that talks to a running system (``options.command_of``)."""

    settings: SettingsOption = None
    target: TargetOption = ""
    api_key: ApiKeyOption = ""

    def client(self) -> BlockragClient:
        """A client of ``target``, or of the system on this machine when that is empty.

        Raises ``NotFoundError`` when nothing runs here. On this machine the first tenant's key is used by itself.
        """
        if self.target:
            return BlockragClient(self.target, api_key=self.api_key or None, patience_s=_PATIENCE_S)
        settings = console.settings_from(self.settings)
        system = LocalSystem.attach(settings)
        tenants = settings.gateway.tenants or system.settings.gateway.tenants
        keys = [key for tenant in tenants[:1] for key in tenant.keys if not key.startswith(HASHED_KEY)]
        return BlockragClient(system.target, api_key=self.api_key or next(iter(keys), None))

    async def describe(self) -> Description:
        """What the system says of itself."""
        async with self.client() as client:
            return await client.describe()
