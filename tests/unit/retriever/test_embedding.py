"""The embedding model: the packaged one, and what any sentence-transformers directory says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

from blockrag.errors import SettingsError
from blockrag.retriever.embedding import Embedder, find_embedding

PACKAGED = find_embedding("")


@pytest.fixture(scope="module")
def packaged() -> Embedder:
    return Embedder(PACKAGED)


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    """A tiny random BERT in a sentence-transformers directory."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "modules.json"):
        shutil.copy(PACKAGED.path / name, directory / name)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    write(directory / "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    return directory


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_packaged_model_is_what_it_says() -> None:
    assert (PACKAGED.name, PACKAGED.dimensions, PACKAGED.max_tokens) == ("all-MiniLM-L6-v2", 384, 256)
    assert (PACKAGED.pooling, PACKAGED.normalize) == ("mean", True)


def test_vectors_are_those_of_sentence_transformers(packaged: Embedder) -> None:
    # First values that sentence-transformers 5 gives for this sentence.
    vector = packaged.embed_query("This is an example sentence")

    assert np.allclose(vector[:4], [0.0677, 0.0635, 0.0487, 0.0793], atol=1e-4)
    assert np.isclose(np.linalg.norm(vector), 1.0, atol=1e-5)


def test_near_in_meaning_is_near(packaged: Embedder) -> None:
    river, bridge, recipe = packaged.embed_passages(
        ["The Rhine is a river in Europe.", "Waterways of Germany", "Whisk the eggs with sugar."]
    )

    assert river @ bridge > river @ recipe + 0.2


def test_passages_keep_their_order_and_padding_changes_nothing(packaged: Embedder) -> None:
    texts = ["short", "a much longer text " * 12, "", "middle sized text here", "x " * 900]
    together = packaged.embed_passages(texts)

    assert together.shape == (5, 384)
    for text, vector in zip(texts, together, strict=True):
        assert np.allclose(vector, packaged.embed_passages([text])[0], atol=1e-5)


def test_recent_queries_are_remembered(packaged: Embedder) -> None:
    assert packaged.embed_query("same question?") is packaged.embed_query("same question?")
    for number in range(300):
        packaged._remembered.put(f"filler {number}", np.zeros(384, dtype=np.float32))
    packaged.embed_query("another")
    assert np.allclose(
        packaged.embed_query("same question?"), packaged.embed_passages(["same question?"])[0], atol=1e-5
    )


def test_another_directory_with_cls_pooling_and_no_normalisation(model_directory: Path) -> None:
    modules = json.loads((model_directory / "modules.json").read_text())
    write(model_directory / "modules.json", modules[:2])
    files = find_embedding(str(model_directory))
    vector = Embedder(files).embed_query("hello")

    assert (files.name, files.dimensions, files.max_tokens) == ("tiny", 16, 64)
    assert (files.pooling, files.normalize) == ("cls", False)
    # The last layer norm's output, as it is.
    assert np.isclose(np.linalg.norm(vector), 4.0, atol=0.1)


def test_prompts_are_put_in_front(model_directory: Path) -> None:
    plain = Embedder(find_embedding(str(model_directory)))
    write(model_directory / "config_sentence_transformers.json", {"prompts": {"query": "query: ", "passage": "p: "}})
    prompted = Embedder(find_embedding(str(model_directory)))

    assert np.allclose(prompted.embed_query("hello"), plain.embed_query("query: hello"), atol=1e-6)
    assert np.allclose(prompted.embed_passages(["hello"]), plain.embed_passages(["p: hello"]), atol=1e-6)
    assert prompted.info.fingerprint != plain.info.fingerprint


@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("include_prompt", [False, True])
@pytest.mark.parametrize("prompts", [{}, {"query": "Find this: ", "document": "[SEP] Title | "}])
def test_options_mean_what_they_mean_to_sentence_transformers(
    model_directory: Path, lower_case: bool, include_prompt: bool, prompts: dict[str, str]
) -> None:
    """Its own vectors of the same directory, with a tokenizer that would keep capitals."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    keep_capitals(model_directory)
    set_options(model_directory, lower_case, include_prompt, prompts)
    embedder = Embedder(find_embedding(str(model_directory)))
    theirs = sentence_transformers.SentenceTransformer(str(model_directory), device="cpu")

    texts = ["hello WORLD", "The Rhine is a RIVER [SEP] in Europe. ÅÄÖ", "", "Word " * 100]
    assert np.allclose(embedder.embed_passages(texts), theirs.encode_document(texts), atol=1e-5)
    for text in texts:
        assert np.allclose(embedder.embed_query(text), theirs.encode_query(text), atol=1e-5)


def test_options_change_vectors_and_so_the_fingerprint(model_directory: Path) -> None:
    keep_capitals(model_directory)
    found = {}
    for options in ((False, True), (True, True), (False, False), (True, False)):
        set_options(model_directory, *options, {"document": "A Title: "})
        embedder = Embedder(find_embedding(str(model_directory)))
        found[embedder.info.fingerprint] = embedder.embed_passages(["Hello World"])[0]
    vectors = np.stack(list(found.values()))
    assert len(vectors) == 4
    assert np.abs(vectors[:, None] - vectors[None]).max(axis=2)[~np.eye(4, dtype=bool)].min() > 1e-3


def test_without_a_prompt_to_leave_out_nothing_changes(model_directory: Path) -> None:
    set_options(model_directory, False, True, {})
    before = find_embedding(str(model_directory)).fingerprint
    set_options(model_directory, False, False, {})
    assert find_embedding(str(model_directory)).fingerprint == before


def keep_capitals(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = None
    write(directory / "tokenizer.json", tokenizer)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    # A class of the model's own would make the normalizer anew.
    write(directory / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def set_options(directory: Path, lower_case: bool, include_prompt: bool, prompts: dict[str, str]) -> None:
    write(directory / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": lower_case})
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    write(directory / "1_Pooling/config.json", {**pooling, "include_prompt": include_prompt})
    write(directory / "config_sentence_transformers.json", {"prompts": prompts})


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def leave_the_prompt_out_of_cls(directory: Path) -> None:
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": False}
    write(directory / "1_Pooling/config.json", pooling)
    write(directory / "config_sentence_transformers.json", {"prompts": {"query": "query: "}})


def add_dense(directory: Path) -> None:
    modules = json.loads((directory / "modules.json").read_text())
    write(directory / "modules.json", [*modules, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda directory: shutil.rmtree(directory), "modules.json"),
        (lambda directory: (directory / "modules.json").unlink(), "modules.json"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json"),
        (
            lambda directory: write(directory / "1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
            "pools by max",
        ),
        (lambda directory: write(directory / "1_Pooling/config.json", {}), "pools by nothing"),
        (lambda directory: shutil.rmtree(directory / "1_Pooling"), "1_Pooling"),
        (add_dense, "Dense"),
        (leave_the_prompt_out_of_cls, "include_prompt"),
        (remove_weights, "cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_refused(model_directory: Path, damage: Callable[[Path], Any], problem: str) -> None:
    damage(model_directory)

    with pytest.raises(SettingsError, match=problem) as caught:
        Embedder(find_embedding(str(model_directory)))
    assert "retriever.embedding_model" in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "vocab.txt"])
def test_a_changed_byte_is_another_model(name: str, model_directory: Path) -> None:
    """Row A10: other weights of the same size."""
    before = find_embedding(str(model_directory)).fingerprint
    file = model_directory / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    changed = find_embedding(str(model_directory)).fingerprint
    assert changed != before
    assert find_embedding(str(model_directory)).fingerprint == changed
    content[-2] ^= 1
    file.write_bytes(content)
    assert find_embedding(str(model_directory)).fingerprint == before


def test_files_are_read_once_in_a_process(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = find_embedding(str(model_directory))
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert find_embedding(str(model_directory)) == before


def test_what_decides_no_vector_changes_nothing(model_directory: Path) -> None:
    before = find_embedding(str(model_directory))
    (model_directory / "README.md").write_text("Another sentence.")
    assert find_embedding(str(model_directory)) == before


@pytest.mark.parametrize("declared", [None, 4000])
def test_a_long_text_is_cut_at_what_the_model_takes(model_directory: Path, declared: int | None) -> None:
    """Row B8: XLM-R's positions begin behind the padding's, so 66 rows take 64 tokens, whatever is declared."""
    config = XLMRobertaConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
    )
    XLMRobertaModel(config).save_pretrained(model_directory)
    if declared:
        write(model_directory / "sentence_bert_config.json", {"max_seq_length": declared})
    embedder = Embedder(find_embedding(str(model_directory)))

    assert embedder.max_tokens == 64
    long, longer = embedder.embed_passages(["word " * 500, "word " * 501])
    np.testing.assert_allclose(long, longer, atol=1e-6)
    assert np.isfinite(embedder.embed_query("word " * 500)).all()
