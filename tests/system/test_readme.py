"""The README's commands, typed as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockrag.client import BlockragClient
from blockrag.errors import InvalidRequestError
from blockrag.local.preflight import free_port
from blockrag.results import Compression
from tests.models import make_tiny_checkpoint

_ROOT = Path(__file__).parent.parent.parent
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_SHELL = re.findall(r"^```sh\n(.*?)^```", _README, re.DOTALL | re.MULTILINE)
_PYTHON = re.findall(r"^```python\n(.*?)^```", _README, re.DOTALL | re.MULTILINE)
_ITSELF = "make test"
_TEXTS = {
    "Fiji": "Fiji is a country of islands in the South Pacific. The capital of Fiji is Suva.",
    "Norway": "Norway is a country in northern Europe. The capital of Norway is Oslo. Its currency is the krone.",
    "Arle Bridge": "The Arle Bridge was built in 1874. It is 212 metres long and was designed by Clara Voss.",
}
_QUESTIONS = {
    "What is the capital of Fiji?": ("Fiji", "Suva"),
    "What is the capital of Norway?": ("Norway", "Oslo"),
    "Who designed the Arle Bridge?": ("Arle Bridge", "Voss"),
    "When was the Arle Bridge built?": ("Arle Bridge", "1874"),
}


def _environment(state_dir: Path) -> dict[str, str]:
    """A state folder and ports of its own, the environment's commands on the path, nothing of another Ray."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BLOCKRAG_CLUSTER__STATE_DIR": str(state_dir),
        "BLOCKRAG_CLUSTER__GRPC_PORT": str(free_port()),
        "BLOCKRAG_CLUSTER__HTTP_PORT": str(free_port()),
        "COLUMNS": "160",
    }


def _run(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, shell=True, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=900)


def _checked(command: str, environment: dict[str, str]) -> str:
    result = _run(command, environment)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def _block_with(command: str) -> list[str]:
    (block,) = (block for block in _SHELL if command in block.splitlines())
    return block.splitlines()


def test_all_blocks_are_known() -> None:
    """A block that is added needs a test here."""
    assert len(_SHELL) == 6
    assert len(_PYTHON) == 2
    assert _block_with(_ITSELF) == [_ITSELF]


@pytest.mark.own_cluster
@pytest.mark.timeout(900)
def test_the_demo(tmp_path: Path) -> None:
    (command,) = _block_with("make demo")
    output = _checked(command, _environment(tmp_path))
    words = " ".join(output.split())
    for row in ("first token", "retrieve", "kv_fetch", "prefill", "found in a cache"):
        assert row in words
    assert "[1]" in output, "no citation was printed"


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the system that the tour's first command started, with the reader that ships."""
    environment = _environment(tmp_path_factory.mktemp("state"))
    up, *_ = _block_with("blockrag up")
    try:
        assert "ready" in _checked(up, environment)
        yield environment
    finally:
        _run("blockrag down", environment)  # nothing stays behind, whatever failed


def _target(environment: dict[str, str]) -> str:
    return f"127.0.0.1:{environment['BLOCKRAG_CLUSTER__GRPC_PORT']}"


@pytest.mark.timeout(900)
def test_the_tour(tour: dict[str, str]) -> None:
    _, *commands, _ = _block_with("blockrag up")
    outputs = {command: _checked(command, tour) for command in commands}
    plain, compressed = (output for command, output in outputs.items() if "--trace" in command)
    for service in ("gateway", "retriever", "decoder", "kv_cache"):
        assert service in plain, plain
    assert "cancelled" not in plain + compressed
    assert "read whole or not at all" in " ".join(compressed.split()), "nothing says what a rate did"
    (listed,) = (output for command, output in outputs.items() if command.startswith("blockrag list"))
    assert "README.md" not in listed
    assert "architecture.md" in listed


def test_from_python(tour: dict[str, str]) -> None:
    script = _PYTHON[0].replace("127.0.0.1:9000", _target(tour))
    assert _target(tour) in script
    answered = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert answered.returncode == 0, answered.stderr
    assert "Usage(" in answered.stdout


def test_clients_of_openai_s_api(tour: dict[str, str]) -> None:
    (block,) = (block for block in _SHELL if "/v1/" in block)
    port = tour["BLOCKRAG_CLUSTER__HTTP_PORT"]
    upload, ask, search = (
        _checked(command.replace(":8000/", f":{port}/").replace("curl", "curl -sS --noproxy '*'", 1), tour)
        for command in block.splitlines()
    )
    assert json.loads(upload)["id"] == "handbook/README.md"
    assert ask.rstrip().endswith("data: [DONE]")
    assert len(json.loads(search)["data"]) == 2

    python = _ROOT / ".venv-clients" / "bin" / "python"
    if not python.exists():
        pytest.skip("make clients installs openai")
    script = _PYTHON[1].replace(":8000/", f":{port}/")
    answered = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60, env={"NO_PROXY": "*"})
    assert answered.returncode == 0, answered.stderr
    assert "file_citation" in answered.stdout


@pytest.mark.parametrize("mode", ["block", "full"])
async def test_what_short_texts_say_is_answered(tour: dict[str, str], mode: Any) -> None:
    """Whether answers are right, which no random bundle can show."""
    async with BlockragClient(_target(tour)) as client:
        for title, text in _TEXTS.items():
            await client.ingest_text(title, text, title=title, collection="short")
        right = 0
        for question, (title, expected) in _QUESTIONS.items():
            answers = [
                await client.ask(question, collection="short", top_k=3, max_tokens=32, attention_mode=mode)
                for _ in range(2)
            ]
            right += expected in answers[0].text
            assert answers[1].text == answers[0].text, "from the cache"
            assert title in {citation.title for citation in answers[0].completion.citations if citation.in_prompt}
    # a reader of this size takes one capital for the other where another country's passage stands last
    assert right >= len(_QUESTIONS) - 1


async def test_a_time_leaves_passages_out(tour: dict[str, str]) -> None:
    """The reader that ships has no chunk encoder: a time is so many tokens of whole passages."""
    async with BlockragClient(_target(tour)) as client:

        async def read(milliseconds: float) -> int:
            timed = await client.ask(
                "What is a block?",
                collection="handbook",
                top_k=20,
                max_tokens=1,
                compression=Compression(max_ttft_ms=milliseconds),
            )
            return timed.completion.usage.context_tokens

        everything = await read(60_000)
        assert everything
        with pytest.raises(InvalidRequestError, match=r"without any passage takes about \d+ ms") as caught:
            await read(1)
        milliseconds = int(re.findall(r"about (\d+) ms", str(caught.value))[0])
        while True:  # another gateway may have measured more
            milliseconds *= 2
            try:
                assert await read(milliseconds) <= everything
                break
            except InvalidRequestError:
                assert milliseconds < 10_000


def test_the_tour_ends(tour: dict[str, str]) -> None:
    *_, down = _block_with("blockrag up")
    assert "stopped" in _checked(down, tour)
    assert _run("blockrag status", tour).returncode == 1


_SHORTER = {
    "blockrag adapt block": "--steps 2 --batch-size 2 --max-passages 2",
    "blockrag adapt pear": "--steps 2 --sizes 4x6 --n 6 --heads 2",
    "blockrag adapt refrag policy": "--max-passages 2 --dev-samples 2",
    "blockrag adapt refrag": "--tokens-per-step 300 --max-passages 2 --dev-samples 2",
    "blockrag bundle verify": "--no-store",
    "blockrag eval compression": "--questions 4 --passages 2 --paragraphs 2 --context 2 --max-answer-tokens 4",
    "blockrag eval qa": "--questions 4 --passages 2 --max-answer-tokens 4",
    "blockrag eval retrieval": "--questions 4",
}
"""What makes a README command quick enough for a test, beside what the README says; numbers of steps are cut too."""


@pytest.mark.timeout(600)
def test_a_model_of_one_s_own(tmp_path: Path) -> None:
    environment = _environment(tmp_path / "state")
    make_tiny_checkpoint(tmp_path / "my-checkpoint")
    rows = [
        {
            "question": f"What colour is gate {number}?",
            "answers": [colour],
            "passages": [
                {"title": f"Gate {number}", "text": f"Gate {number} is {colour}. It is old.", "gold": True},
                {"title": f"Wall {number}", "text": f"Wall {number} is grey and long.", "gold": False},
            ],
        }
        for number, colour in enumerate(["red", "blue", "green", "white", "black", "brown"] * 4)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paragraphs = [f"Gate {number} was built by hand. It is old. Nobody walks through it now." for number in range(12)]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"title": f"Town {number}", "paragraphs": paragraphs}) + "\n" for number in range(4)),
        encoding="utf-8",
    )
    for command in (
        *_block_with("blockrag bundle verify my-bundle"),
        *_block_with("blockrag bundle verify my-bundle-refrag"),
    ):
        more = next(options for start, options in _SHORTER.items() if command.startswith(start))
        command = re.sub(r"--steps \d+", "--steps 2", command)
        result = subprocess.run(
            f"{command} {more}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        # A random model may have no head that suppresses copying; then there is nothing to keep, and it says so.
        if "adapt pear" in command and result.returncode != 0:
            assert "no head" in result.stderr, result.stderr
            shutil.copytree(tmp_path / "my-bundle", tmp_path / "my-bundle-pear")
            continue
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert (tmp_path / "results/qa/qa.md").is_file()
    assert (tmp_path / "results/retrieval").is_dir()
    assert (tmp_path / "results/compression/compression.md").is_file()
