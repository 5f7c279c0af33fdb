import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from blockrag.training.related_words import load_related_words

WORDS = ("city", "town", "founded", "established", "of", "##ed", "Town", "stone")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """Two pairs of words that point the same way, a word alone, and tokens that are no words."""
    directions = {"city": 0, "town": 0, "founded": 1, "established": 1, "of": 0, "##ed": 1, "Town": 0, "stone": 2}
    embeddings = np.full((len(WORDS), 16), 3.0, dtype=np.float32)  # what all share means nothing
    for place, word in enumerate(WORDS):
        embeddings[place, directions[word]] += 2.0
        embeddings[place, 5 + place] += 0.2
    save_file({"bert.embeddings.word_embeddings.weight": embeddings}, tmp_path / "model.safetensors")
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}), encoding="utf-8")
    return tmp_path


def test_words_that_point_the_same_way_are_related(encoder: Path) -> None:
    related = load_related_words(encoder)
    assert related == {"city": ("town",), "town": ("city",), "founded": ("established",), "established": ("founded",)}


def test_a_directory_without_word_embeddings_is_refused(encoder: Path) -> None:
    save_file({"other": np.zeros((2, 2), dtype=np.float32)}, encoder / "model.safetensors")
    with pytest.raises(ValueError, match="word_embeddings"):
        load_related_words(encoder)
    (encoder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_related_words(encoder)
