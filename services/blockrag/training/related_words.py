"""Words that mean nearly the same, taken from the token embeddings of a sentence encoder.

An encoder that was trained on sentence pairs has "founded" beside "established" and "city" beside "town" already in its
input embeddings. A reader trained from scratch sees too little text to learn that by itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors import safe_open

_WORD = re.compile(r"[a-z]{3,}")
_MOST = 5
_LEAST_SIMILARITY = 0.4
_ROWS = 2048  # at a time; all similarities at once would take gigabytes


def load_related_words(model_dir: Path) -> dict[str, tuple[str, ...]]:
    """For each lower-case word of an encoder's vocabulary at most five others, the most similar first.

    ``model_dir`` is a Hugging Face directory with ``model.safetensors`` and a WordPiece ``tokenizer.json``. Similarity
    is the cosine of the token embeddings less their mean, at least 0.4. Raises ``FileNotFoundError`` where a file is
    absent and ``ValueError`` where there are no word embeddings in it.
    """
    vocabulary = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    with safe_open(model_dir / "model.safetensors", framework="np") as tensors:
        names = [name for name in tensors.keys() if name.endswith("word_embeddings.weight")]  # noqa: SIM118
        if not names:
            raise ValueError(f"{model_dir}: no word_embeddings.weight in model.safetensors")
        embeddings = tensors.get_tensor(names[0]).astype(np.float32)
    words = [word for word in vocabulary if _WORD.fullmatch(word)]
    vectors = embeddings[[vocabulary[word] for word in words]]
    vectors -= vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    most = min(_MOST, len(words) - 1)
    related: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(words), _ROWS):
        similar = vectors[start : start + _ROWS] @ vectors.T
        similar[np.arange(len(similar)), start + np.arange(len(similar))] = -1  # a word is not its own synonym
        best = np.argpartition(-similar, most, axis=1)[:, :most]
        for row, places in enumerate(best):
            ordered = sorted(places.tolist(), key=lambda place: -similar[row, place])
            found = tuple(words[place] for place in ordered if similar[row, place] >= _LEAST_SIMILARITY)
            if found:
                related[words[start + row]] = found
    return related
