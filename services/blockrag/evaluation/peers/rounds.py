"""Peers' processes, and what they are asked in which order; of llama.cpp also files of the types that it multiplies."""

from __future__ import annotations

import json
import random
import select
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys
from gguf.quants import dequantize, quantize

from blockrag.errors import BundleError
from blockrag.modeling.bundle import Bundle
from blockrag.settings import Settings

STATES = {
    "memory": "blocks in memory",
    "store": "blocks from the object store",
    "disk": "blocks from disk",
    "cold": "blocks encoded first",
    "full": "full attention",
    "new": "passages in a new order",
    "again": "the same passages in the same order again",
}
OUR_STATES = ("memory", "store", "disk", "cold", "full")
THEIR_STATES = ("new", "again")
_TIMEOUT_S = 1800.0


class PeerFailedError(Exception):
    """A peer's process ended, hung or reported an error."""


@dataclass(frozen=True)
class PeerSpec:
    """A peer as it is asked for."""

    label: str
    command: Sequence[str]
    """Empty where it cannot be had."""
    states: Sequence[str]
    missing: str = ""
    """Why it cannot be had."""


@dataclass(frozen=True)
class PeerRow:
    """What a peer took in one state at one size. Times are medians, in milliseconds."""

    peer: str
    state: str
    """A key of ``STATES``; empty for a peer that cannot be had."""
    context_tokens: int
    streams: int
    first_ms: float | None = None
    """Until every stream has its first token."""
    token_ms: float | None = None
    """Of a step of all streams behind it."""
    repeats: int = 0
    memory_mb: int | None = None
    """Resident memory of its process after the last run."""
    note: str = ""


@dataclass(frozen=True)
class PeerTask:
    """What every peer is asked at one size."""

    context_tokens: int
    streams: int


class PeerProcess:
    """A peer's process; to be closed."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self.name = str(self._answer()["ready"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def ask(self, task: Mapping[str, Any]) -> tuple[float, float]:
        """Milliseconds to the first token and of each further one. Raises PeerFailedError."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise PeerFailedError(answer["error"])
        return float(answer["first_ms"]), float(answer["token_ms"])

    def memory_mb(self) -> int:
        """Resident memory now."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) // 1024
        return 0

    def _answer(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], _TIMEOUT_S)[0]:
            raise PeerFailedError(f"no answer within {_TIMEOUT_S:g} s")
        line = stdout.readline()
        if not line:
            raise PeerFailedError(f"its process ended with {self._process.wait()}")
        return json.loads(line)


def our_command(name: str, settings: Settings) -> list[str]:
    """The command of a peer of ``workers``."""
    said = settings.model_dump_json(include={"bundle", "decoder"})  # others see a command line: no secret in it
    return [sys.executable, "-m", "blockrag.evaluation.peers.ours", name, said]


def all_peers(
    bundle: Bundle, settings: Settings, package: Path | None, gguf: Path | None, folder: Path
) -> list[PeerSpec]:
    """blockrag, stock transformers, and llama.cpp on the base's own file and on one of Q8_0, which goes to ``folder``.

    ``package``: the folder of node-llama-cpp; ``gguf``: llama.cpp's model, None: the GGUF file of the base.
    """
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


def measure_peers(
    peers: Sequence[PeerSpec],
    tasks: Sequence[PeerTask],
    *,
    block_tokens: int,
    vocabulary: int,
    question_tokens: int = 50,
    new_tokens: int = 16,
    repeats: int = 3,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[PeerRow]:
    """Ask every peer every task in each of its states, ``repeats`` times, interleaved, after a round at the first task.

    Contexts are blocks of ``block_tokens`` random tokens, for every repeat in a new order, and every question is new,
    so what a peer keeps is of use only where the state says so. ``progress`` gets rounds done and wanted.
    """
    chooser = random.Random(0)
    rows = [PeerRow(spec.label, "", 0, 0, note=spec.missing) for spec in peers if not spec.command]
    times: dict[tuple[str, str, PeerTask], list[tuple[float, float]]] = {}
    memory: dict[tuple[str, PeerTask], int] = {}
    failed: dict[tuple[str, str, PeerTask], str] = {}
    names: dict[str, str] = {}
    with ExitStack() as running:
        processes: dict[str, PeerProcess] = {}
        for spec in peers:
            if spec.command:
                try:
                    processes[spec.label] = running.enter_context(closing(PeerProcess(spec.command)))
                    names[spec.label] = f"{spec.label}, {processes[spec.label].name}"
                except PeerFailedError as error:
                    rows.append(PeerRow(spec.label, "", 0, 0, note=str(error)))
        blocks = {task: _random_blocks(chooser, task, block_tokens, vocabulary) for task in tasks}
        rounds = [(False, task) for task in tasks[:1]] + [(True, task) for _ in range(repeats) for task in tasks]
        for number, (counts, task) in enumerate(rounds):
            for stream in blocks[task]:
                chooser.shuffle(stream)
            for spec in peers:
                for state in spec.states if spec.label in processes else ():
                    prompts = [
                        {"blocks": stream, "question": _random_ids(chooser, question_tokens, vocabulary)}
                        for stream in blocks[task]
                    ]
                    key = (spec.label, state, task)
                    try:
                        taken = processes[spec.label].ask(
                            {"stream_prompts": prompts, "state": state, "new_tokens": new_tokens}
                        )
                    except PeerFailedError as error:
                        failed[key] = str(error)
                        continue
                    if counts:
                        times.setdefault(key, []).append(taken)
                        memory[spec.label, task] = processes[spec.label].memory_mb()
            progress(number + 1, len(rounds))
    for spec in peers:
        for task in tasks:
            for state in spec.states if spec.label in processes else ():
                found = times.get((spec.label, state, task))
                rows.append(
                    PeerRow(
                        names[spec.label],
                        state,
                        task.context_tokens,
                        task.streams,
                        first_ms=round(statistics.median(one[0] for one in found), 1) if found else None,
                        token_ms=round(statistics.median(one[1] for one in found), 2) if found else None,
                        repeats=len(found or ()),
                        memory_mb=memory.get((spec.label, task)),
                        note=failed.get((spec.label, state, task), ""),
                    )
                )
    return rows


def _random_blocks(chooser: random.Random, task: PeerTask, block_tokens: int, vocabulary: int) -> list[list[list[int]]]:
    sizes = [min(block_tokens, task.context_tokens - start) for start in range(0, task.context_tokens, block_tokens)]
    return [[_random_ids(chooser, size, vocabulary) for size in sizes] for _ in range(task.streams)]


def _random_ids(chooser: random.Random, count: int, vocabulary: int) -> list[int]:
    return [chooser.randrange(vocabulary) for _ in range(count)]


INSTALL = "not installed: npm install --ignore-scripts node-llama-cpp, then --llama node_modules/node-llama-cpp"
_SCRIPT = Path(__file__).with_name("llama.mjs")


class MissingPeerError(Exception):
    """A peer that cannot be had here; the message says why."""


def llama_command(package: Path | None, gguf: Path, threads: int) -> list[str]:
    """The command of llama.cpp's process. ``package``: the folder of node-llama-cpp. Raises MissingPeerError."""
    node = shutil.which("node")
    if package is None or node is None:
        raise MissingPeerError(INSTALL if node else f"{INSTALL}; it needs Node.js")
    if not (package / "dist" / "index.js").is_file():
        raise MissingPeerError(f"{package} holds no node-llama-cpp; {INSTALL}")
    return [node, str(_SCRIPT), str(package), str(gguf), str(threads)]


def requantised(source: Path, kind: GGMLQuantizationType, target: Path) -> Path:
    """Write the model of ``source`` to ``target`` with its matrices in another type; what is no matrix stays."""
    reader = GGUFReader(source)
    architecture = str(reader.fields[Keys.General.ARCHITECTURE].contents())
    writer = GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name == Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            wide = dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def type_of(source: Path) -> str:
    """The type that most matrices of a GGUF file are in, like "Q4_1"."""
    kinds = [tensor.tensor_type for tensor in GGUFReader(source).tensors if len(tensor.shape) > 1]
    return max(set(kinds), key=kinds.count).name
