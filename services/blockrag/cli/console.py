"""How commands print (rich text for people, JSON for programs, one line for errors), and which system they talk to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from blockrag.client import BlockragClient
from blockrag.errors import BlockragError
from blockrag.local import LocalSystem
from blockrag.settings import API_KEY_VARIABLE, Settings, load_settings
from blockrag.tenants import HASHED_KEY

T = TypeVar("T")

_FILE_WIDTH = 160
"""Columns of what goes into a file or a pipe: at a terminal's 80 the wider tables lose their numbers."""


class _Console(Console):
    @property  # type: ignore[misc]  # nobody sets it
    def size(self) -> ConsoleDimensions:
        found = super().size
        known = self.is_terminal or "COLUMNS" in self._environ
        return found if known else ConsoleDimensions(_FILE_WIDTH, found.height)


# Text is printed as it is: what looks like Rich's markup came from a document. Styles are given as Text objects.
out = _Console(markup=False, emoji=False)
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


def answer(as_json: bool, value: Any, *shown: Any) -> None:
    """What a command found: ``value`` for ``--json``, else what is ``shown`` to people, one below the other."""
    if as_json:
        print_json(value)
        return
    for each in shown:
        out.print(each)


@contextmanager
def errors_to_exit() -> Iterator[None]:
    """Prints an error of ours as one line and exits with 1; everything else keeps its traceback."""
    try:
        yield
    except BlockragError as error:
        kind = type(error).__name__.removesuffix("Error")
        line = Text.assemble(("error:", "bold red"), f" {kind}: {printable(str(error))}")
        err.print(line, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def printable(text: str) -> str:
    """The text with what is no Unicode, as in names of files, written as \\udc.. escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def description_column() -> TextColumn:
    """What a progress bar is at, as it is."""
    return TextColumn("{task.description}", markup=False)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error while something goes on; what it is given replaces its text."""
    with err.status(Text(text)) as line:
        yield lambda shown: line.update(Text(shown))


def progress_bar() -> Progress:
    """A progress bar on standard error."""
    return Progress(
        SpinnerColumn(),
        description_column(),
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
        settings = settings_from(self.settings)
        system = LocalSystem.attach(settings)
        tenants = settings.gateway.tenants or system.settings.gateway.tenants
        keys = [key for tenant in tenants[:1] for key in tenant.keys if not key.startswith(HASHED_KEY)]
        return BlockragClient(system.target, api_key=self.api_key or next(iter(keys), None))

    def run(self, work: Callable[[BlockragClient], Awaitable[T]]) -> T:
        """What ``work`` finds with a client, which is closed after it."""

        async def found() -> T:
            async with self.client() as client:
                return await work(client)

        return asyncio.run(found())
