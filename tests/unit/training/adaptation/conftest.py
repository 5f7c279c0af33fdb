"""Small question data and checkpoints for adaptation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from blockrag.training.adaptation.block_config import BlockAdaptConfig
from tests.models import make_tiny_checkpoint

COLOURS = ("red", "blue", "green", "white", "black", "grey")
PLACES = ("Arlen", "Brod", "Cato", "Dunmore", "Eger", "Faro", "Gale", "Holm", "Ivrea", "Jena", "Kiel", "Lund")


def colour_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions about the colour of a town's gate, each with its passage and one about another town."""
    random = Random(seed)
    rows = []
    for _ in range(count):
        town, other = random.sample(PLACES, 2)
        colour, second = random.sample(COLOURS, 2)
        passages = [
            {"title": town, "text": f"The gate of {town} is {colour}. It is old.", "gold": True},
            {"title": other, "text": f"The gate of {other} is {second}. It is new.", "gold": False},
        ]
        rows.append({"question": f"What colour is the gate of {town}?", "answers": [colour], "passages": passages})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 80 rows."""
    return write_rows(tmp_path / "rows.jsonl", colour_rows(80))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer."""
    return make_tiny_checkpoint(tmp_path / "checkpoint", max_position_embeddings=512)


@pytest.fixture
def config(tmp_path: Path, data: Path, checkpoint: Path) -> Callable[..., BlockAdaptConfig]:
    """A configuration of a short run, with what a test wants otherwise."""

    def make(**changes: Any) -> BlockAdaptConfig:
        values: dict[str, Any] = {
            "model": checkpoint,
            "data": (data,),
            "out": tmp_path / "bundle",
            "steps": 3,
            "batch_size": 4,
            "micro_batch": 2,
            "warmup_steps": 1,
            "learning_rate": 3e-3,
            "max_passages": 4,
            "passage_tokens": 64,
            "max_tokens": 400,
            "dev_rows": 4,
            "precision": "fp32",
        }
        return BlockAdaptConfig(**{**values, **changes})

    return make
