"""The benchmark beside peers: the real processes on a tiny bundle; llama.cpp's where it is not installed."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.evaluation.peers.rounds import (
    INSTALL,
    OUR_STATES,
    THEIR_STATES,
    MissingPeerError,
    PeerProcess,
    PeerSpec,
    PeerTask,
    llama_command,
    measure_peers,
    our_command,
    requantised,
    type_of,
)
from blockrag.evaluation.plots import plot_peers
from blockrag.settings import DecoderSettings, KvCacheSettings, Settings
from tests.gguf_files import F32, make_tiny_gguf, tiny_gguf_model
from tests.models import make_tiny_bundle


@pytest.mark.slow
def test_measures_blockrag_and_transformers(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    command = ["bench", "peers", "--contexts", "64,200", "--streams", "2", "--stream-contexts", "100", "--json"]
    counts = ["--question-tokens", "9", "--new-tokens", "4", "--repeats", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, *counts], env={"BLOCKRAG_BUNDLE__PATH": str(bundle)})
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "peers.json").read_text())["rows"]
    missing = [row for row in rows if not row["state"]]
    assert [row["peer"] for row in missing] == ["llama.cpp"]
    assert "no GGUF file" in missing[0]["note"]
    measured = [row for row in rows if row["state"]]
    assert [(row["context_tokens"], row["streams"], row["state"]) for row in measured] == [
        (size, streams, state)
        for states in (OUR_STATES, THEIR_STATES)
        for size, streams in ((64, 1), (200, 1), (100, 2))
        for state in states
    ]
    assert all(row["first_ms"] > 0 and row["token_ms"] > 0 and row["repeats"] == 2 for row in measured)
    assert all(row["memory_mb"] > 50 and not row["note"] for row in measured)
    assert {row["peer"].split()[0].rstrip(",") for row in measured} == {"blockrag", "transformers"}
    assert (tmp_path / "out" / "peers.png").read_bytes().startswith(b"\x89PNG")


ANSWERS = """
import json, sys
print(json.dumps({"ready": "1.0"}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    (stream,) = task["stream_prompts"]
    if task["state"] == "again":
        print(json.dumps({"error": "cannot"}), flush=True)
    else:
        print(json.dumps({"first_ms": sum(map(len, stream["blocks"])), "token_ms": stream["blocks"][0][0]}), flush=True)
"""


def test_rows_of_peers_that_fail_or_are_missing() -> None:
    peers = [
        PeerSpec("one", [sys.executable, "-c", ANSWERS], THEIR_STATES),
        PeerSpec("ends", [sys.executable, "-c", "raise SystemExit(3)"], THEIR_STATES),
        PeerSpec("absent", (), THEIR_STATES, missing="not installed"),
    ]
    rounds: list[tuple[int, int]] = []
    rows = measure_peers(
        peers,
        [PeerTask(40, 1), PeerTask(64, 1)],
        block_tokens=16,
        vocabulary=50,
        new_tokens=3,
        repeats=3,
        progress=lambda *done: rounds.append(done),
    )
    assert rounds[-1] == (7, 7)
    notes = {(row.peer, row.state, row.context_tokens): row.note for row in rows}
    assert notes["absent", "", 0] == "not installed"
    assert notes["ends", "", 0] == "its process ended with 3"
    assert notes["one, 1.0", "again", 64] == "cannot"
    timed = {row.context_tokens: row for row in rows if row.state == "new"}
    assert [timed[size].first_ms for size in (40, 64)] == [40, 64]  # three blocks, the last of 8; four
    assert timed[64].repeats == 3 and timed[64].memory_mb is not None
    assert plot_peers(rows, "title").startswith(b"\x89PNG")


def test_passages_are_in_a_new_order_every_time_and_in_the_same_for_every_peer(tmp_path: Path) -> None:
    script = "import json, sys\nprint(json.dumps({'ready': 'x'}), flush=True)\nfile = open(sys.argv[1], 'w')\n"
    script += "for line in sys.stdin:\n    file.write(line); file.flush()\n"
    script += "    print(json.dumps({'first_ms': 1, 'token_ms': 1}), flush=True)\n"
    files = [tmp_path / "a", tmp_path / "b"]
    peers = [PeerSpec(file.name, [sys.executable, "-c", script, str(file)], ("new", "again")) for file in files]
    measure_peers(peers, [PeerTask(256, 1)], block_tokens=16, vocabulary=1000, repeats=2)
    asked = [[json.loads(line)["stream_prompts"][0] for line in file.read_text().splitlines()] for file in files]
    orders = [[tuple(map(tuple, prompt["blocks"])) for prompt in prompts] for prompts in asked]
    assert orders[0] == orders[1]
    assert orders[0][0::2] == orders[0][1::2]  # again is the order of the one before
    assert len(set(orders[0])) == 3
    assert len({frozenset(order) for order in orders[0]}) == 1
    questions = [tuple(prompt["question"]) for prompts in asked for prompt in prompts]
    assert len(set(questions)) == len(questions)


def test_llama_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPeerError, match=r"it needs Node\.js"):
        llama_command(None, tmp_path / "model.gguf", 2)
    (tmp_path / "node").write_text("#!/bin/sh\n")
    (tmp_path / "node").chmod(0o755)
    with pytest.raises(MissingPeerError) as found:
        llama_command(None, tmp_path / "model.gguf", 2)
    assert str(found.value) == INSTALL
    with pytest.raises(MissingPeerError, match="holds no node-llama-cpp"):
        llama_command(tmp_path, tmp_path / "model.gguf", 2)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "index.js").touch()
    command = llama_command(tmp_path, tmp_path / "model.gguf", 2)
    assert command[2:] == [str(tmp_path), str(tmp_path / "model.gguf"), "2"]


def test_a_file_in_another_type(tmp_path: Path) -> None:
    source = make_tiny_gguf(tmp_path / "float.gguf", tiny_gguf_model(), kind=F32)
    target = requantised(source, GGMLQuantizationType.Q8_0, tmp_path / "eight.gguf")
    assert type_of(target) == "Q8_0" != type_of(source)
    before, after = GGUFReader(source), GGUFReader(target)
    assert {name for name in before.fields if not name.startswith("GGUF.")} == {
        name for name in after.fields if not name.startswith("GGUF.")
    }
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.shape.tolist()) == (new.name, new.shape.tolist())
        wide = [dequantize(tensor.data, tensor.tensor_type) for tensor in (old, new)]
        assert abs(wide[0] - wide[1]).max() <= abs(wide[0]).max() / 200


def test_a_process_that_is_left_is_ended() -> None:
    with closing(PeerProcess([sys.executable, "-c", ANSWERS])) as peer:
        assert peer.memory_mb() > 0
        process = peer._process
    assert process.returncode is not None


def test_no_secret_is_on_a_command_line() -> None:
    settings = Settings(kv_cache=KvCacheSettings(secret="nobody else may know"), decoder=DecoderSettings(threads=1))
    command = our_command("blockrag", settings)
    assert "nobody" not in " ".join(command)
    assert Settings.model_validate_json(command[-1]).decoder.threads == 1
