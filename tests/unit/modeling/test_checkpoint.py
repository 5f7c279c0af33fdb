"""What is wrong with a checkpoint is said when the bundle is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockrag.errors import BundleError
from blockrag.modeling.bundle_writing import create_bundle
from blockrag.modeling.checkpoint import load_checkpoint
from tests.models import TEST_TEMPLATE, make_tiny_checkpoint, make_tiny_model, make_tiny_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "checkpoint")


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_refused(folder: Path, problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        create_bundle(folder, folder.parent / "out", TEST_TEMPLATE)
    assert not (folder.parent / "out").exists()
    with pytest.raises(BundleError, match=problem):
        load_checkpoint(folder, torch.float32)


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "mlp.extra_proj.weight"])
def test_weights_that_the_model_has_no_place_for(checkpoint: Path, name: str) -> None:
    """A2 of the cases: a bias that the configuration does not mention would be dropped."""
    path = checkpoint / "model.safetensors"
    weights = {**load_file(path), f"model.layers.0.{name}": torch.ones(32)}
    save_file(weights, path, metadata={"format": "pt"})
    assert_refused(checkpoint, rf"LlamaForCausalLM.* no place for weights .*model\.layers\.0\.{name}")


def test_weights_that_are_missing(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if "layers.1.mlp.up_proj" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    assert_refused(checkpoint, r"weights are missing: model\.layers\.1\.mlp\.up_proj\.weight")


def test_weights_of_another_shape(checkpoint: Path) -> None:
    """A2 of the cases, the kind: the weights are named, and no report is spoken of that nobody was shown."""
    configure(checkpoint, intermediate_size=40)
    assert_refused(
        checkpoint, r"another shape than the configuration says: model\.layers\.0\.mlp\.down_proj\.weight \(\[.*40\]\)"
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_weights(checkpoint: Path, method: str) -> None:
    """B7 of the cases."""
    configure(checkpoint, quantization_config={"quant_method": method, "bits": 4})
    assert_refused(checkpoint, rf"its weights are quantised \({method}\)")


def test_quantised_weights_that_the_configuration_does_not_mention(checkpoint: Path) -> None:
    """B7 of the cases."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    narrow = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, narrow: weights[narrow].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
    assert_refused(checkpoint, r"quantised\?\): model\.layers\.0\.mlp\.up_proj\.weight")
    (checkpoint / "quantize_config.json").write_text("{}")
    assert_refused(checkpoint, r"quantised \(quantize_config\.json\)")


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_code_of_its_own(checkpoint: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B7 of the cases: refused, and nothing is asked on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    configure(checkpoint, model_type=model_type, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    assert_refused(checkpoint, r"code of its own \(auto_map: modeling_own\.OwnForCausalLM\)")


def test_a_missing_shard(tmp_path: Path) -> None:
    """B7 of the cases."""
    folder = tmp_path / "checkpoint"
    make_tiny_model().save_pretrained(folder, max_shard_size="20KB")
    make_tiny_tokenizer().save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    create_bundle(folder, tmp_path / "whole", TEST_TEMPLATE)
    shards[1].unlink()
    assert_refused(folder, rf"1 of {len(shards)} shards are missing: {shards[1].name}")
    (folder / "model.safetensors.index.json").unlink()
    assert_refused(folder, r"neither model\.safetensors nor model\.safetensors\.index\.json")


def test_an_adapter_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    assert_refused(checkpoint, r"holds an adapter \(adapter_config\.json\)")


def test_a_damaged_number(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=r"NaN or infinity in model\.norm\.weight"):
        create_bundle(checkpoint, tmp_path / "out", TEST_TEMPLATE)
