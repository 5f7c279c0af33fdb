"""Weights as they are served: the same numbers, written once, mapped by all, made in memory where that cannot be."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blockrag.errors import BundleError
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.checkpoint import load_stock_model
from blockrag.modeling.measuring import own_logits, probe_of
from blockrag.modeling.model import SlotModel
from blockrag.modeling.served import ServedModel, load_served_model
from blockrag.modeling.step import pack, packed_weights
from blockrag.modeling.support import inspect_model
from tests.models import FAMILIES, make_tiny_bundle
from tests.unit.modeling.test_base import files_of_at_most

_SUITED = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
}
"""A model that has a step in eight bits."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return load_bundle(make_tiny_bundle(tmp_path / "bundle", **_SUITED), compute_dtype="bfloat16")


def served(bundle: Bundle) -> ServedModel:
    return load_served_model(bundle, least_bytes=0)


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "served").iterdir() if path.is_dir())


def mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file that is mapped."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= place < last:
            return rest.endswith("weights.bin")
    return False


def assert_same(got: ServedModel, bundle: Bundle) -> None:
    stock = load_stock_model(bundle)
    facts = inspect_model(stock)
    expected = dict(stock.named_parameters(remove_duplicate=False)) | dict(stock.named_buffers())
    found = dict(got.model.named_parameters(remove_duplicate=False)) | dict(got.model.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert got.model.dtype == stock.dtype
    place = {"_name_or_path": ""}
    assert got.model.config.to_dict() | place == stock.config.to_dict() | place
    assert got.model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert not got.model.training
    probe = probe_of(facts)
    assert torch.equal(own_logits(got.model, probe, 0), own_logits(stock, probe, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_same_and_mapped(family: str, dtype: str, tmp_path: Path) -> None:
    made = load_bundle(make_tiny_bundle(tmp_path / "bundle", family=family), compute_dtype=dtype)
    for _ in range(2):  # written, read
        got = served(made)
        assert_same(got, made)
        assert all(mapped(parameter) for parameter in got.model.parameters())


def test_the_second_reads_what_the_first_wrote(bundle: Bundle, cache: Path) -> None:
    served(bundle)
    [folder] = folders(cache)
    before = (folder / "weights.bin").stat()
    served(bundle)
    assert (folder / "weights.bin").stat().st_ino == before.st_ino
    assert (folder / "weights.bin").stat().st_mtime_ns == before.st_mtime_ns


def test_eight_bits_are_what_would_be_packed(bundle: Bundle) -> None:
    got = served(bundle)
    stock = load_stock_model(bundle)
    expected = packed_weights(pack(stock, inspect_model(stock)))
    assert got.packed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got.packed[name], tensor), name
        assert mapped(got.packed[name])
        assert got.packed[name].data_ptr() % 64 == 0
    again = packed_weights(pack(got.model, inspect_model(got.model), got.packed))
    assert all(again[name] is got.packed[name] for name in expected)


def test_fused_products_are_the_mapped_memory(bundle: Bundle, cache: Path) -> None:
    model = SlotModel.from_pretrained_model(served(bundle).model)
    layer = model.layers[0]
    for module in (layer.self_attn.q_proj, layer.mlp.gate_proj):
        assert mapped(module.forward._product.weight)
        assert module.forward._product.weight.data_ptr() == module.weight.data_ptr()


def test_a_model_over_mapped_weights_answers_alike(bundle: Bundle, tmp_path: Path) -> None:
    tokens = [5, 9, 12, 7]
    logits = []
    for model in (
        SlotModel.from_pretrained_model(load_stock_model(bundle)),
        SlotModel.from_pretrained_model(served(bundle).model),
    ):
        state = model.new_sequence([], 8)
        logits.append(model.forward([(state, tokens)]))
    assert torch.equal(*logits)


def test_types_and_contents_have_folders_of_their_own(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    served(bundle)
    load_served_model(bundle, compute_dtype="float32", least_bytes=0)
    served(load_bundle(make_tiny_bundle(tmp_path / "other", seed=1, **_SUITED), compute_dtype="bfloat16"))
    assert len(folders(cache)) == 3


def test_the_least_recently_used_are_removed(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    served(bundle)
    [first] = folders(cache)
    os.utime(first, (1, 1))
    for seed in range(1, 5):
        served(load_bundle(make_tiny_bundle(tmp_path / f"{seed}", seed=seed, **_SUITED)))
    assert len(folders(cache)) == 4
    assert first not in folders(cache)


def test_small_models_are_not_kept(bundle: Bundle, cache: Path) -> None:
    got = load_served_model(bundle)
    assert_same(got, bundle)
    assert not got.packed
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["a bit", "shorter", "no description", "another description", "no record"])
def test_what_is_damaged_is_made_again(damage: str, bundle: Bundle, cache: Path) -> None:
    served(bundle)
    [folder] = folders(cache)
    weights = folder / "weights.bin"
    if damage == "a bit":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no description":
        (folder / "tensors.json").unlink()
    elif damage == "another description":
        described = json.loads((folder / "tensors.json").read_text())
        described["parameters"]["model.norm.weight"][2] = 0
        (folder / "tensors.json").write_text(json.dumps(described))
    else:
        (folder / "converted.json").write_text("{")
    assert_same(served(bundle), bundle)
    assert_same(served(bundle), bundle)


@pytest.mark.parametrize("place", ["/proc/blockrag", "/dev/full"])
def test_a_cache_that_cannot_be_written_is_done_without(
    place: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BLOCKRAG_CACHE", place)
    assert_same(served(bundle), bundle)
    assert "held by each process" in caplog.text


def test_a_full_cache_is_done_without_and_left_clean(bundle: Bundle, cache: Path) -> None:
    with files_of_at_most(20_000):
        got = served(bundle)
    assert_same(got, bundle)
    assert folders(cache) == []


def test_what_others_may_have_written_is_not_mapped(bundle: Bundle, cache: Path) -> None:
    served(bundle)
    [folder] = folders(cache)
    (folder / "weights.bin").chmod(0o666)
    got = served(bundle)
    assert_same(got, bundle)
    assert not any(mapped(parameter) for parameter in got.model.parameters())


def test_damaged_weights_of_a_bundle_are_refused(bundle: Bundle, cache: Path) -> None:
    weights = bundle.decoder_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        served(bundle)
    assert folders(cache) == []


def test_two_processes_write_it_once(bundle: Bundle, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")  # torch has threads here
    workers = [context.Process(target=served, args=(bundle,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(folders(cache)) == 1
    assert_same(served(bundle), bundle)
