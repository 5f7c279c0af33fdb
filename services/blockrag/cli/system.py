"""``blockrag up | down | status | doctor``."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import typer
from rich.table import Table
from rich.text import Text

from blockrag.access import hashed_key
from blockrag.cli import console
from blockrag.cli.console import Connection, JsonOption, SettingsOption
from blockrag.cli.options import command_of
from blockrag.errors import NotFoundError
from blockrag.local import LocalSystem
from blockrag.local.doctor import examine
from blockrag.results import Description


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(epilog="Example: blockrag up --settings my.yaml && blockrag status")(up)
    app.command(epilog="Example: blockrag down")(down)
    app.command(epilog="Example: blockrag key")(key)
    app.command(epilog="Example: blockrag status --json | jq .kv_cache")(status)
    app.command(epilog="Example: blockrag doctor --settings my.yaml")(doctor)


def up(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """Start Ray and the Serve applications on this machine; they go on in the background."""
    with console.errors_to_exit():
        loaded = console.settings_from(settings)
        with console.status("starting") as show:
            system = LocalSystem.start(loaded, on_progress=show)
        names = ("target", "http_url", "ray_address", "metrics_url")
        console.answer(
            as_json,
            {name: getattr(system, name) for name in names},
            f"ready at {system.target} (gRPC) and {system.http_url} (OpenAI's API); stop it with 'blockrag down'",
            f"in a browser: {system.http_url.removesuffix('v1')}",
        )


def down(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """Stop what 'blockrag up' started. Documents stay, and the attention state that is on disk."""
    with console.errors_to_exit():
        try:
            system = LocalSystem.attach(console.settings_from(settings))
        except NotFoundError:
            stopped = False
        else:
            with console.status("stopping"):
                system.stop()
            stopped = True
        console.answer(as_json, {"stopped": stopped}, "stopped" if stopped else "nothing was running")


@command_of(Connection, last=True)
def status(connection: Connection, as_json: JsonOption = False) -> None:
    """Show the services, the bundle, the index and the caches; exits with 1 when a service is down."""
    description = connection.run(lambda client: client.describe())
    console.answer(as_json, description, *_status_tables(description))
    if not description.healthy:
        raise typer.Exit(1)


def key(as_json: JsonOption = False) -> None:
    """Make a tenant's key: the key is the tenant's, its hash goes into the settings (api_keys)."""
    made = secrets.token_urlsafe(32)
    text = f"key (once, for the tenant): {made}\nhash (for gateway.tenants): {hashed_key(made)}"
    console.answer(as_json, {"key": made, "hash": hashed_key(made)}, text)


def doctor(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """Say what is wrong with this machine or configuration, and the way out; exits with 1 when nothing could start."""
    with console.errors_to_exit():
        findings = examine(console.settings_from(settings))
        styles = {"ok": "green", "warning": "yellow", "problem": "red"}
        table = Table("looked at", "state", "found", "way out")
        for finding in findings:
            state = Text(finding.level, style=styles[finding.level])
            table.add_row(finding.subject, state, finding.text, finding.way_out)
        console.answer(as_json, {"findings": findings}, table)
        if any(finding.level == "problem" for finding in findings):
            raise typer.Exit(1)


def _status_tables(description: Description) -> Iterator[Table]:
    table = Table("service", "state", "ms", "detail")
    for service in description.services:
        state = Text("healthy", "green") if service.healthy else Text("down", "red")
        table.add_row(service.name, state, f"{service.milliseconds:.1f}", service.detail)
    yield table
    cache, decoder, index = description.kv_cache, description.decoder, description.retriever
    facts = Table.grid(padding=(0, 2))
    facts.add_row("bundle", f"{description.bundle_name} {description.bundle_fingerprint[:12]}")
    read = "weights in eight bits for decode steps" if decoder["weights"] == "int8" else "whole weights"
    facts.add_row("computes", f"{decoder['compute_dtype']} on {decoder['device']}, {read}")
    if decoder.get("kv_dtype"):  # absent where the decoder is down
        facts.add_row("blocks", f"{decoder['kv_dtype']}, {int(decoder['slot_bytes']) / 1024:.1f} KiB a token")
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
    disk = cache.get("disk")  # absent where the cache is down
    if disk and any(int(disk[name]) for name in ("budget_bytes", "hits", "written", "dropped")):
        held = f"{disk['blocks']} blocks, {_mib(disk['bytes'])} of {_mib(disk['budget_bytes'])} MiB, "
        subject, held = ("on disk", held) if int(disk["budget_bytes"]) else ("on the volume", "")
        facts.add_row(
            subject,
            f"{held}{disk['hits']} hits, {disk['evictions']} evicted, {disk['rejected']} rejected, "
            f"{disk['dropped']} dropped",
        )
    for warning in disk["warnings"] if disk else ():
        facts.add_row("", Text(warning, style="yellow"))
    facts.add_row(
        "decoder memory",
        f"{decoder['l1_blocks']} blocks, {_mib(decoder['l1_bytes'])} of {_mib(decoder['l1_budget_bytes'])} MiB, "
        f"{decoder['l1_hits']} hits, {decoder['l1_misses']} misses",
    )
    facts.add_row("sequences", f"{decoder['running']} running, {decoder['waiting']} waiting")
    yield facts
    rows = [(tenant["tenant"], quota) for tenant in description.tenants for quota in tenant["quotas"]]
    if any(int(quota["limit"]) for _, quota in rows):
        quotas = Table("tenant", "of its limit", "used", "limit")
        for name, quota in rows:
            quotas.add_row(name, quota["name"], str(quota["used"]), str(quota["limit"]) if int(quota["limit"]) else "-")
        yield quotas


def _mib(count: int) -> str:
    return f"{int(count) / 2**20:.0f}"
