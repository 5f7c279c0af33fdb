"""``blockrag up | down | status``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from blockrag.cli import console
from blockrag.cli.connection import connect
from blockrag.cli.console import ApiKeyOption, JsonOption, SettingsOption, TargetOption
from blockrag.errors import NotFoundError
from blockrag.local import LocalSystem
from blockrag.results import Description


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(epilog="Example: blockrag up --settings my.yaml && blockrag status")(up)
    app.command(epilog="Example: blockrag down")(down)
    app.command(epilog="Example: blockrag status --json | jq .kv_cache")(status)


def up(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """Start Ray and the six Serve applications on this machine; they go on in the background."""
    with console.errors_to_exit():
        loaded = console.settings_from(settings)
        with console.err.status("starting") as line:
            system = LocalSystem.start(loaded, on_progress=line.update)
        if as_json:
            console.print_json(
                {"target": system.target, "ray_address": system.ray_address, "metrics_url": system.metrics_url}
            )
        else:
            console.out.print(f"ready at [bold]{system.target}[/]; stop it with 'blockrag down'")


def down(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """Stop what 'blockrag up' started. Documents stay; cached attention state is forgotten."""
    with console.errors_to_exit():
        try:
            system = LocalSystem.attach(console.settings_from(settings))
        except NotFoundError:
            stopped = False
        else:
            with console.err.status("stopping"):
                system.stop()
            stopped = True
        if as_json:
            console.print_json({"stopped": stopped})
        else:
            console.out.print("stopped" if stopped else "nothing was running")


def status(
    settings: SettingsOption = None, target: TargetOption = "", api_key: ApiKeyOption = "", as_json: JsonOption = False
) -> None:
    """Show the services, the bundle, the index and the caches; exits with 1 when a service is down."""
    with console.errors_to_exit():
        description = asyncio.run(_describe(settings, target, api_key))
        if as_json:
            console.print_json(description)
        else:
            _print_status(description)
        if not description.healthy:
            raise typer.Exit(1)


async def _describe(settings: Path | None, target: str, api_key: str) -> Description:
    async with connect(settings, target, api_key) as client:
        return await client.describe()


def _print_status(description: Description) -> None:
    table = Table("service", "state", "ms", "detail")
    for service in description.services:
        state = "[green]healthy[/]" if service.healthy else "[red]down[/]"
        table.add_row(service.name, state, f"{service.milliseconds:.1f}", escape(service.detail))
    console.out.print(table)
    cache, decoder, index = description.kv_cache, description.decoder, description.retriever
    facts = Table.grid(padding=(0, 2))
    facts.add_row("bundle", f"{description.bundle_name} {description.bundle_fingerprint[:12]}")
    read = "weights in eight bits for decode steps" if decoder["weights"] == "int8" else "whole weights"
    facts.add_row("computes", f"{decoder['compute_dtype']} on {decoder['device']}, {read}")
    facts.add_row("index", f"{index['passages']} passages, {index['backend']}, {index['embedding_model']}")
    facts.add_row(
        "object store cache",
        f"{cache['blocks']} blocks, {_mib(cache['bytes'])} of {_mib(cache['budget_bytes'])} MiB, "
        f"{cache['hits']} hits, {cache['misses']} misses, {cache['evictions']} evicted",
    )
    for form in cache["forms"]:
        facts.add_row(
            f"  {form['form']}",
            f"{form['blocks']} blocks, {_mib(form['bytes'])} MiB, {form['hits']} hits, {form['misses']} misses",
        )
    facts.add_row(
        "decoder memory",
        f"{decoder['l1_blocks']} blocks, {_mib(decoder['l1_bytes'])} of {_mib(decoder['l1_budget_bytes'])} MiB, "
        f"{decoder['l1_hits']} hits, {decoder['l1_misses']} misses",
    )
    facts.add_row("sequences", f"{decoder['running']} running, {decoder['waiting']} waiting")
    console.out.print(facts)


def _mib(count: int) -> str:
    return f"{int(count) / 2**20:.0f}"
