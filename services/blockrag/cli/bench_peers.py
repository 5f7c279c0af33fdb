"""``blockrag bench peers``: beside stock transformers and llama.cpp."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli import console
from blockrag.cli.console import JsonOption, SettingsOption
from blockrag.cli.evaluate_options import parse_numbers, write_results
from blockrag.errors import BundleError, SetupError
from blockrag.settings import Settings

if TYPE_CHECKING:
    from blockrag.evaluation.peers.measuring import PeerRow, PeerSpec
    from blockrag.modeling.bundle import Bundle

_LONGEST = 10**6


def peers(
    contexts: Annotated[str, typer.Option(help="Passage tokens of one stream, comma separated.")] = "512,2048,7900",
    streams: Annotated[int, typer.Option(min=1, max=64, help="Streams of the second measurement; 1: none.")] = 8,
    stream_contexts: Annotated[str, typer.Option(help="Passage tokens of each of several streams.")] = "512",
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the passages, always new.")] = 50,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each, interleaved.")] = 3,
    llama: Annotated[
        Path | None,
        typer.Option(help="Folder of node-llama-cpp, as npm installs it; left out, llama.cpp's rows say how to."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="llama.cpp's model; default: the GGUF file of the base.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for peers.json and peers.png.")] = None,
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The same weights, prompts, threads and machine: blockrag, stock transformers and llama.cpp, interleaved.

    Each is a process of its own; the services between them and a client are not measured here. On a machine that does
    other work compare within a run only.
    """
    from blockrag.configured import configured_bundle
    from blockrag.evaluation.environment import describe_environment
    from blockrag.evaluation.peers.measuring import PeerTask, measure_peers
    from blockrag.evaluation.plots import load_figure, plot_peers

    with console.errors_to_exit():
        if out is not None:
            load_figure()
        loaded = console.settings_from(settings)
        bundle = configured_bundle(loaded)
        tasks = [PeerTask(size, 1) for size in parse_numbers(contexts, "--contexts", _LONGEST)]
        if streams > 1:
            sizes = parse_numbers(stream_contexts, "--stream-contexts", _LONGEST)
            tasks += [PeerTask(size, streams) for size in sizes]
        if not tasks:
            raise SetupError("nothing to measure: name --contexts or --stream-contexts")
        longest = max(task.context_tokens for task in tasks) + question_tokens + new_tokens
        if longest > bundle.max_context_tokens:
            raise SetupError(f"{longest} tokens, where the bundle has {bundle.max_context_tokens}")
        with tempfile.TemporaryDirectory(prefix="blockrag-peers-") as folder, console.progress_bar() as bar:
            bar_task = bar.add_task("rounds", total=None)
            rows = measure_peers(
                _peers(bundle, loaded, llama, gguf, Path(folder)),
                tasks,
                block_tokens=bundle.passage_tokens,
                vocabulary=bundle.vocab_size,
                question_tokens=question_tokens,
                new_tokens=new_tokens,
                repeats=repeats,
                progress=lambda done, total: bar.update(bar_task, completed=done, total=total),
            )
        environment = describe_environment()
        result = {
            "rows": [asdict(row) for row in rows],
            "threads": loaded.decoder.threads,
            "question_tokens": question_tokens,
            "new_tokens": new_tokens,
            "environment": asdict(environment),
        }
        if out is not None:
            title = f"{environment.cores} × {environment.cpu}, {loaded.decoder.threads} threads"
            text = json.dumps(result, indent=2) + "\n"
            write_results(out, {"peers.json": text.encode(), "peers.png": plot_peers(rows, title)})
        if as_json:
            console.print_json(result)
        else:
            console.out.print(_table(rows))


def _peers(bundle: Bundle, settings: Settings, package: Path | None, gguf: Path | None, folder: Path) -> list[PeerSpec]:
    from gguf import GGMLQuantizationType

    from blockrag.evaluation.peers.llama import MissingPeerError, llama_command, requantised, type_of
    from blockrag.evaluation.peers.measuring import OUR_STATES, THEIR_STATES, PeerSpec, our_command

    found = [
        PeerSpec("blockrag", our_command("blockrag", settings), OUR_STATES),
        PeerSpec("transformers", our_command("transformers", settings), THEIR_STATES),
    ]
    threads, label = settings.decoder.threads, "llama.cpp"
    try:
        if gguf is None and (bundle.base is None or bundle.base.directory):
            raise MissingPeerError("the bundle's base is no GGUF file: name one by --gguf")
        file = gguf if gguf is not None or bundle.base is None else bundle.base.gguf_file(bundle.path)
        assert file is not None
        llama_command(package, file, threads)  # or nothing need be written
        kind, wide = type_of(file), GGMLQuantizationType.Q8_0
        files = {kind: file}
        if kind != wide.name:
            files[wide.name] = requantised(file, wide, folder / "Q8_0.gguf")
        for kind, path in files.items():
            label = f"llama.cpp {kind}"
            found.append(PeerSpec(label, llama_command(package, path, threads), THEIR_STATES))
    except (MissingPeerError, BundleError) as error:
        found.append(PeerSpec(label, (), THEIR_STATES, missing=str(error)))
    return found


def _table(rows: list[PeerRow]) -> Table:
    from blockrag.evaluation.peers.measuring import STATES

    table = Table("", "passage tokens", "streams", "first token, ms", "ms a token", "memory, MiB", "")
    shown = ""
    for row in rows:
        if row.peer != shown:
            table.add_section()
            table.add_row(Text(row.peer, "bold"), "", "", "", "", "", "" if row.state else row.note)
            shown = row.peer
        if row.state:
            numbers = [
                "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
                for value in (row.first_ms, row.token_ms)
            ]
            where = (f"{row.context_tokens}", f"{row.streams}")
            table.add_row(f"  {STATES[row.state]}", *where, *numbers, f"{row.memory_mb or '–'}", row.note)
    return table
