"""Small texts, questions and bundles for learning to read compressed passages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from blockrag.training.refrag.stage_config import RefragConfig
from tests.models import make_tiny_bundle
from tests.unit.training.adaptation.conftest import colour_rows, write_rows

_WORDS = ("gate", "tower", "river", "bridge", "market", "old", "new", "red", "blue", "long", "city", "country", "land")


def write_texts(path: Path, count: int = 12, sentences: int = 24) -> Path:
    """Texts of short sentences over a few words."""
    random = Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            parts = [f"The {' '.join(random.choices(_WORDS, k=5))} is here." for _ in range(sentences)]
            out.write(json.dumps({"title": f"Text {number}", "paragraphs": [" ".join(parts)]}) + "\n")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", colour_rows(40))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "base", max_position_embeddings=1024)


@pytest.fixture
def config(tmp_path: Path, texts: Path, rows: Path, bundle: Path) -> Callable[..., RefragConfig]:
    """A configuration of a short run, with what a test wants otherwise."""

    def make(**changes: Any) -> RefragConfig:
        values: dict[str, Any] = {
            "bundle": bundle,
            "out": tmp_path / "made",
            "stage": "pretrain",
            "text": (texts,),
            "data": (rows,),
            "chunk_tokens": 4,
            "steps": 3,
            "tokens_per_step": 600,
            "warmup_steps": 2,
            "max_passages": 3,
            "dev_samples": 3,
            "precision": "fp32",
            "learning_rate": 5e-3,
            "decoder_learning_rate": 5e-3,
        }
        return RefragConfig(**{**values, **changes})

    return make
