"""``blockrag ingest | list | delete | warm``."""

from __future__ import annotations

import gzip
import os
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from blockrag.characters import normalise
from blockrag.cli import console
from blockrag.cli.console import CollectionOption, Connection, JsonOption
from blockrag.cli.options import command_of
from blockrag.client import BlockragClient
from blockrag.errors import BlockragError, InvalidRequestError, NotFoundError
from blockrag.languages import LANGUAGES
from blockrag.results import Document, IngestedDocument, IngestOptions, WarmProgress
from blockrag.syncing import Sync

SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf", ".jsonl")
"""What a directory is searched for."""


@dataclass(frozen=True)
class Source:
    """One file, or the sample corpus, on its way in."""

    document_id: str
    path: Path | None
    """None: the sample corpus."""

    async def send(
        self, client: BlockragClient, collection: str, options: IngestOptions
    ) -> tuple[IngestedDocument, ...]:
        """Streams it to the server."""
        if self.path is not None:
            given: IngestOptions = {**options, "collection": collection}
            return await client.ingest_file(self.path, document_id=self.document_id, **given)
        from blockrag.corpus.sample import articles_path

        content = gzip.decompress(articles_path().read_bytes())
        given = {**options, "collection": collection, "media_type": "application/jsonl"}
        return await client.ingest_bytes(self.document_id, content, **given)


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(epilog="Examples: blockrag ingest handbook.pdf docs/ -c work · blockrag ingest --sync docs/")(ingest)
    app.command("list", epilog="Example: blockrag list -c work --json")(list_documents)
    app.command(epilog="Examples: blockrag delete handbook.pdf -c work · blockrag delete --source rows.jsonl")(delete)
    app.command(epilog="Example: blockrag warm -c work --pin")(warm)


@command_of(Connection, last=True)
def ingest(
    connection: Connection,
    paths: Annotated[list[Path] | None, typer.Argument(help="Files, or directories to search.")] = None,
    collection: CollectionOption = "default",
    almanac: Annotated[bool, typer.Option("--almanac", help="Ingest the sample corpus instead.")] = False,
    sync: Annotated[
        bool, typer.Option("--sync", help="Make the collection equal: remove every other document, with its KV.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, say what would change.")] = False,
    language: Annotated[
        str, typer.Option(help=f"Of a new collection: {', '.join(LANGUAGES)}; default: the server's setting.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Store documents (txt, md, html, pdf, jsonl). The same again changes nothing, a changed one replaces it.

    With --sync a document that no file holds any more is removed. Of a file that fails, all documents stay.
    """
    if almanac == bool(paths):
        raise InvalidRequestError("paths", "give files or directories, or --almanac")
    if almanac and collection == "default":
        collection = "almanac"
    sources = [Source("almanac.jsonl", None)] if almanac else list(find_sources(paths or []))
    if not sources:
        raise InvalidRequestError("paths", f"no files ending in {', '.join(SUFFIXES)} found")
    options = IngestOptions(language=language, dry_run=dry_run)
    failed = connection.run(lambda client: _ingest(client, sources, collection, options, sync, as_json))
    if failed:
        raise typer.Exit(1)


def find_sources(paths: list[Path]) -> Iterator[Source]:
    """Files as they are named; files of directories with their path below the directory as the id.

    Raises ``InvalidRequestError`` for a path that does not exist, and for two files that would get one id: the second
    would replace the first, or as a jsonl file share its source with it.
    """
    taken: dict[str, Path] = {}
    for name, file in _files(paths):
        document_id = normalise(name)
        other = taken.setdefault(document_id, file)
        if other is file:
            yield Source(document_id, file)
        elif not other.samefile(file):
            raise InvalidRequestError(
                "paths",
                f"{console.printable(str(other))} and {console.printable(str(file))} would both be "
                f"{console.printable(document_id)!r}; name the directory above them, or two collections",
            )


def _files(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    for path in paths:
        if path.is_dir():
            for file in sorted(_below(path)):
                yield file.relative_to(path).as_posix(), file
        elif path.is_file():
            yield path.name, path
        else:
            raise InvalidRequestError("paths", f"{console.printable(str(path))} does not exist")


def _below(directory: Path) -> Iterator[Path]:
    """Files of known kinds. Raises ``InvalidRequestError`` for a directory that cannot be read: what it holds would
    seem to be gone."""

    def refuse(error: OSError) -> None:
        name = console.printable(str(error.filename))
        raise InvalidRequestError("paths", f"{name} cannot be read: {error.strerror}") from error

    for folder, _, names in os.walk(directory, onerror=refuse):
        for file in (Path(folder, name) for name in names):
            if file.suffix.lower() in SUFFIXES and _is_file(file):
                yield file


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # a link to what is gone
        return False
    except OSError:  # it is there: it fails alone, when it is sent
        return True


async def _ingest(
    client: BlockragClient,
    sources: list[Source],
    collection: str,
    options: IngestOptions,
    syncing: bool,
    as_json: bool,
) -> int:
    counts = {"created": 0, "replaced": 0, "unchanged": 0, "removed": 0, "failed": 0}
    passages = 0
    sync = await Sync.begin(client, collection) if syncing else None
    with console.progress_bar() as bar:
        task = bar.add_task("ingesting", total=len(sources))
        for source in sources:
            bar.update(task, description=console.printable(source.document_id))
            try:
                stored = await source.send(client, collection, options)
            except (BlockragError, OSError) as error:
                # One bad file must not keep the others out.
                counts["failed"] += 1
                if sync is not None:
                    sync.keep_all_of(source.document_id)
                name, problem = console.printable(source.document_id), console.printable(str(error))
                line = Text.assemble(("failed", "red"), f" {name}: {problem}")
                bar.console.print(line, highlight=False, soft_wrap=True)
                if as_json:
                    console.print_json_line({"document_id": name, "error": problem})
            else:
                if sync is not None:
                    sync.keep(stored)
                for document in stored:
                    counts[document.outcome] += 1
                    passages += document.passages
                    if as_json:
                        console.print_json_line(document)
            bar.advance(task)
    if sync is not None:
        for gone in sync.gone() if options["dry_run"] else await sync.finish():
            counts["removed"] += 1
            if as_json:
                fields = {"document_id": gone.document_id, "passages": gone.passages, "outcome": "removed"}
                console.print_json_line(fields)
            else:
                console.err.print(Text.assemble(("removed", "yellow"), f" {gone.document_id}"), highlight=False)
    if not as_json:
        text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        note = "nothing was changed: " if options["dry_run"] else ""
        console.out.print(f"{note}{text}; {passages} passages in collection '{collection}'")
    return counts["failed"]


@command_of(Connection, last=True)
def list_documents(
    connection: Connection,
    collection: CollectionOption = "",
    as_json: JsonOption = False,
) -> None:
    """List a collection's documents, or the collections when none is named."""

    async def documents(client: BlockragClient) -> list[Document]:
        return [item async for item in client.list_documents(collection=collection)]

    if not collection:
        collections = connection.run(lambda client: client.list_collections())
        table = Table("collection", "documents", "passages", "language")
        for each in collections:
            table.add_row(each.name, str(each.documents), str(each.passages), each.language)
        console.answer(as_json, collections, table)
        return
    found = connection.run(documents)
    table = Table("document", "title", "passages", "version", "source")
    for item in found:
        source = "" if item.source == item.document_id else item.source
        table.add_row(item.document_id, item.title, str(item.passages), item.version[:12], source)
    console.answer(as_json, found, table)


@command_of(Connection, last=True)
def delete(
    connection: Connection,
    document_ids: Annotated[list[str] | None, typer.Argument(help="Documents to remove.")] = None,
    collection: CollectionOption = "default",
    source: Annotated[str, typer.Option("--source", help="Remove what came from this file.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Remove the whole collection.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove documents, or a collection, with their passages and cached attention state."""

    async def run(client: BlockragClient) -> list[dict[str, object]]:
        if everything:
            gone = await client.delete_collection(collection)
            return [{"collection": collection, **vars(gone)}]
        if source:
            gone_with = await client.delete_source(source, collection=collection)
            return [{"source": source, **vars(gone_with)}]
        found: list[dict[str, object]] = []
        for name in document_ids or []:
            try:
                found.append({"document_id": name, **vars(await client.delete_document(name, collection=collection))})
            except NotFoundError as error:  # the others are to go all the same
                found.append({"document_id": name, "error": str(error)})
        return found

    if [everything, bool(document_ids), bool(source)].count(True) != 1:
        raise InvalidRequestError("document_ids", "give documents, or --source, or --all")
    if everything and not yes:
        typer.confirm(f"Remove collection '{collection}' with everything in it?", abort=True)
    removed = connection.run(run)
    lines: list[str | Text] = []
    for item in removed:
        name = item.get("document_id") or item.get("source") or f"collection '{collection}'"
        if "error" in item:
            lines.append(Text.assemble(("failed", "red"), f" {name}: {item['error']}"))
        else:
            lines.append(f"removed {name}: {item['passages']} passages, {item['purged_blocks']} cached blocks")
    console.answer(as_json, removed, *lines)
    if any("error" in item for item in removed):
        raise typer.Exit(1)


@command_of(Connection, last=True)
def warm(
    connection: Connection,
    document_ids: Annotated[list[str] | None, typer.Argument(help="Documents; default: all.")] = None,
    collection: CollectionOption = "default",
    pin: Annotated[bool, typer.Option("--pin", help="Keep them when the cache runs full.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Encode passages ahead of time, so that the first question finds them in the cache."""
    last = connection.run(
        lambda client: show_warming(client.warm(collection=collection, document_ids=document_ids or [], pin=pin))
    )
    console.answer(as_json, last, describe_warming(last))
    if not as_json and last.done < last.total:
        console.err.print(Text("the cache's byte budget holds no more: raise kv_cache.budget_mb", "yellow"))


def describe_warming(last: WarmProgress) -> str:
    """What a finished warming did."""
    return (
        f"{last.done} of {last.total} passages are warm: {last.hits} were, {last.done - last.hits} encoded now "
        f"({last.encoded_bytes / 2**20:.0f} MiB)"
    )


async def show_warming(steps: AsyncIterator[WarmProgress]) -> WarmProgress:
    """Shows the progress of a warming; returns its last step."""
    last = WarmProgress(0, 0, 0, 0, False)
    with console.progress_bar() as bar:
        task = bar.add_task("warming", total=None)
        async for last in steps:
            bar.update(task, completed=last.done, total=last.total)
    return last
