"""How commands print: rich text for people, JSON for programs, one line for errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from blockrag.errors import BlockragError
from blockrag.settings import API_KEY_VARIABLE, Settings, load_settings

# What is printed is data, and "[/x]" or ":b:" in it no markup: style is given apart.
out = Console(markup=False, emoji=False)
"""Answers go here."""
err = Console(stderr=True, markup=False, emoji=False)
"""Progress and errors go here, so that ``--json`` output stays clean."""

SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", "-s", help="Settings YAML; default: built-in defaults and BLOCKRAG_… variables."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TargetOption = Annotated[
    str, typer.Option("--target", help="gRPC address host:port; default: the system running on this machine.")
]
ApiKeyOption = Annotated[str, typer.Option("--api-key", envvar=API_KEY_VARIABLE, help="The tenant's key.")]
CollectionOption = Annotated[str, typer.Option("--collection", "-c", help="Collection of documents.")]


def settings_from(path: Path | None) -> Settings:
    """Settings of a command."""
    return load_settings(path)


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2))


def print_json_line(value: Any) -> None:
    """One JSON value on one line: for commands that print several."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False))


@contextmanager
def errors_to_exit(exit_code: int = 1) -> Iterator[None]:
    """Prints an error of ours as one line and exits with 1; everything else keeps its traceback."""
    try:
        yield
    except BlockragError as error:
        err.print("error:", style="bold red", end=" ")
        err.print(
            f"{type(error).__name__.removesuffix('Error')}: {printable(str(error))}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(exit_code) from error


def printable(text: str) -> str:
    """The text with what is no Unicode, as in names of files, written as \\udc.. escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def progress_bar() -> Progress:
    """A progress bar on standard error."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
    )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return printable(str(value))
    return value
