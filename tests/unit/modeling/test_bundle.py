from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockrag.errors import BundleError, UnsupportedModelError
from blockrag.modeling.bundle import DEFAULT_BUNDLE, file_sha256, load_bundle
from blockrag.modeling.bundle_writing import create_bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.template import PromptTemplate
from tests.models import TEST_TEMPLATE, TINY_VOCAB, make_tiny_bundle, make_tiny_checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def bundle_dir(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def change_manifest(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def sign_again(root: Path) -> None:
    """Write the present files' digests into the manifest."""

    def sign(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: file_sha256(root / name) for name in manifest["files"]}

    change_manifest(root, sign)


def test_loads_what_it_wrote(bundle_dir: Path) -> None:
    bundle = load_bundle(bundle_dir)
    assert (bundle.name, bundle.version, bundle.template) == ("tiny", "1", TEST_TEMPLATE)
    assert (bundle.chunk_tokens, bundle.passage_tokens, bundle.max_context_tokens) == (16, 64, 2048)
    assert bundle.vocab_size == TINY_VOCAB
    tokenizer = bundle.load_tokenizer()
    assert bundle.template.instruction_ids(tokenizer) == [1]
    assert tokenizer.decode(tokenizer("Ångström 42")["input_ids"]) == "Ångström 42"
    assert SlotModel.load(bundle).end_token_ids == {2}


def test_the_bundle_that_ships_loads() -> None:
    bundle = load_bundle(DEFAULT_BUNDLE)
    assert len(bundle.load_tokenizer()) <= bundle.vocab_size
    assert bundle.passage_tokens < bundle.max_context_tokens


def test_fingerprint_is_of_content_not_of_place(bundle_dir: Path, pristine: Path) -> None:
    assert load_bundle(bundle_dir).fingerprint == load_bundle(pristine, verify_files=False).fingerprint
    change_manifest(bundle_dir, lambda manifest: manifest.update(name="renamed", quality={"exact_match": 0.5}))
    assert load_bundle(bundle_dir).fingerprint == load_bundle(pristine).fingerprint


def test_fingerprint_counts_weights_template_and_types(bundle_dir: Path, tmp_path: Path) -> None:
    seen = {load_bundle(bundle_dir).fingerprint}
    seen.add(load_bundle(bundle_dir, kv_dtype="bfloat16").fingerprint)
    seen.add(load_bundle(bundle_dir, compute_dtype="bfloat16").fingerprint)
    seen.add(load_bundle(make_tiny_bundle(tmp_path / "other", seed=1)).fingerprint)
    change_manifest(bundle_dir, lambda manifest: manifest["template"].update(refusal="unknown"))
    seen.add(load_bundle(bundle_dir).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda manifest: manifest.update(format=2), "format 2 is unknown"),
        (lambda manifest: manifest.pop("format"), "format None is unknown"),
        (lambda manifest: manifest.update(plum={}), "unknown keys: plum"),
        (lambda manifest: manifest.pop("template"), "missing keys: template"),
        (lambda manifest: manifest.update(chunk_tokens=0), "chunk_tokens must be positive"),
        (lambda manifest: manifest.update(chunk_tokens=True), "chunk_tokens must be of type int"),
        (lambda manifest: manifest.update(files=[]), "files must be of type dict"),
        (
            lambda manifest: manifest["template"].update(system="x"),
            "template: must have the keys .*; wrong keys: system",
        ),
        (lambda manifest: manifest["template"].update(final="no question"), "template.final lacks {question}"),
        (lambda manifest: manifest["template"].update(end=""), "template.end is empty"),
        (lambda manifest: manifest["template"].update(end=2), "template texts must be strings"),
        (lambda manifest: manifest["files"].update({"../secret": "0" * 64}), "is outside the bundle"),
        (lambda manifest: manifest["files"].update({"decoder/config.json": "md5"}), "has no SHA-256"),
        (lambda manifest: manifest["files"].pop("decoder/tokenizer.json"), "files lacks decoder/tokenizer.json"),
        (lambda manifest: manifest["files"].pop("decoder/model.safetensors"), "files lacks weights"),
    ],
)
def test_refuses_a_wrong_manifest(bundle_dir: Path, change: Callable[[dict[str, Any]], Any], problem: str) -> None:
    change_manifest(bundle_dir, change)
    with pytest.raises(BundleError, match=problem):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_refuses_a_manifest_that_is_no_object(bundle_dir: Path, content: str) -> None:
    (bundle_dir / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(bundle_dir)


def test_names_a_missing_directory_and_file(bundle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        load_bundle(tmp_path / "nothing")
    (bundle_dir / "decoder" / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing"):
        load_bundle(bundle_dir, verify_files=False)


@pytest.mark.parametrize("verify_files", [True, False])
@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_names_a_truncated_file(bundle_dir: Path, kept: int, verify_files: bool) -> None:
    weights = bundle_dir / "decoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(BundleError, match=r"model\.safetensors: truncated or no safetensors file"):
        load_bundle(bundle_dir, verify_files=verify_files)


def test_names_a_file_that_was_changed(bundle_dir: Path) -> None:
    weights = bundle_dir / "decoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.safetensors: content differs"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_the_weight_that_is_not_finite(bundle_dir: Path, value: float) -> None:
    weights = bundle_dir / "decoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    sign_again(bundle_dir)
    with pytest.raises(BundleError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight"):
        SlotModel.load(load_bundle(bundle_dir))


def test_names_weights_that_are_missing(bundle_dir: Path) -> None:
    weights = bundle_dir / "decoder" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    sign_again(bundle_dir)
    with pytest.raises(BundleError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        SlotModel.load(load_bundle(bundle_dir))


def test_names_weights_of_another_size(bundle_dir: Path) -> None:
    weights = bundle_dir / "decoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] = torch.zeros(12, 32)
    save_file(tensors, weights, metadata={"format": "pt"})
    sign_again(bundle_dir)
    with pytest.raises(BundleError, match="decoder"):
        SlotModel.load(load_bundle(bundle_dir))


def test_refuses_a_vocabulary_larger_than_the_embedding(bundle_dir: Path) -> None:
    path = bundle_dir / "decoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": TINY_VOCAB - 1}))
    sign_again(bundle_dir)
    with pytest.raises(BundleError, match=f"wrong vocabulary: token id {TINY_VOCAB - 1}"):
        load_bundle(bundle_dir).load_tokenizer()


@pytest.mark.parametrize(("field", "text"), [("instruction", "<|system|>"), ("end", "the end")])
def test_refuses_special_tokens_that_the_vocabulary_lacks(bundle_dir: Path, field: str, text: str) -> None:
    change_manifest(bundle_dir, lambda manifest: manifest["template"].update({field: text}))
    with pytest.raises(BundleError, match="is no single token"):
        load_bundle(bundle_dir).load_tokenizer()


def test_refuses_a_damaged_tokenizer(bundle_dir: Path) -> None:
    (bundle_dir / "decoder" / "tokenizer.json").write_text("{}")
    sign_again(bundle_dir)
    with pytest.raises(BundleError, match="the tokenizer does not load"):
        load_bundle(bundle_dir).load_tokenizer()


def test_refuses_an_unknown_type(bundle_dir: Path) -> None:
    with pytest.raises(BundleError, match="float16"):
        load_bundle(bundle_dir, kv_dtype="float16")


def test_create_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    wrong = PromptTemplate(**{**TEST_TEMPLATE.to_dict(), "instruction": "<|no such token|>"})
    with pytest.raises(BundleError, match="is no single token"):
        create_bundle(checkpoint, tmp_path / "out", wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_create_refuses_what_exists_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(BundleError, match="exists already"):
        create_bundle(checkpoint, tmp_path, TEST_TEMPLATE)
    with pytest.raises(BundleError, match="no causal language model"):
        create_bundle(tmp_path / "nothing", tmp_path / "out", TEST_TEMPLATE)
    with pytest.raises(BundleError, match="9999 context tokens"):
        create_bundle(checkpoint, tmp_path / "out", TEST_TEMPLATE, max_context_tokens=9999)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="lacks a fast tokenizer"):
        create_bundle(checkpoint, tmp_path / "out", TEST_TEMPLATE)


def test_create_refuses_a_model_that_cannot_be_driven(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        create_bundle(checkpoint, tmp_path / "out", TEST_TEMPLATE)
