from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from blockrag.modeling import step
from blockrag.modeling.attention.contract import RaggedBatch
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.bundle_writing import create_bundle
from blockrag.modeling.native.kernels import kernels
from blockrag.modeling.step import Step
from blockrag.modeling.stock_passes import block_mask
from blockrag.modeling.verify import verify_bundle
from blockrag.types import BlockKV
from tests.models import FAMILIES, TEST_TEMPLATE, TINY_VOCAB, make_tiny_bundle, make_tiny_tokenizer
from tests.unit.modeling.test_support import DRIVEN, build


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_model_passes(family: str, tmp_path: Path) -> None:
    report = verify_bundle(make_tiny_bundle(tmp_path / family, family=family))
    assert report.passed
    modes = ("full mode", "block mode", "block mode shuffled", "block mode through the store")
    assert [check.name for check in report.checks] == [
        *(f"{mode}, {source}" for source in ("random tokens", "text") for mode in modes),
        "full mode up to the last position, text",
        "block mode up to the last position, text",
    ]
    assert all(0 <= check.max_difference < check.tolerance for check in report.checks)


def test_wider_tolerances_for_bfloat16(tiny: Path) -> None:
    report = verify_bundle(load_bundle(tiny, compute_dtype="bfloat16", kv_dtype="bfloat16"))
    assert report.passed
    assert report.limits.relative > 100 * verify_bundle(tiny).limits.relative


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_says_how_often_first_tokens_agree_and_how_far_predictions_are(tiny: Path, kv_dtype: str) -> None:
    report = verify_bundle(load_bundle(tiny, kv_dtype=kv_dtype))
    for check in report.checks:
        assert check.agreement is not None and report.limits.agreement <= check.agreement <= 1
        assert check.divergence is not None and -1e-7 <= check.divergence <= report.limits.divergence


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_an_error_that_no_rounding_explains_fails_in_bfloat16_too(tiny: Path, dtypes: tuple[str, str]) -> None:
    """Keys a fifth too large: the gate's limits are a few times what rounding was measured to explain."""

    def damage(block: BlockKV) -> BlockKV:
        keys = torch.from_numpy(block.keys).view(torch.bfloat16).float() * 1.2
        return replace(block, keys=keys.to(torch.bfloat16).view(torch.uint16).numpy())

    bundle = load_bundle(tiny, compute_dtype=dtypes[0], kv_dtype=dtypes[1])
    report = verify_bundle(bundle, through_store=damage, texts=["One passage."])
    failed = [check for check in report.checks if not check.passed]
    assert failed and all("through the store" in check.name for check in failed)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Phi", "Cohere2", "StableLm"])
def test_every_kind_of_rotation_and_window_passes(family: str, tmp_path: Path) -> None:
    """The whole way of a checkpoint: bundle create, verify."""
    overrides = {**DRIVEN[family], "vocab_size": TINY_VOCAB}
    build(family, **overrides).save_pretrained(tmp_path / "checkpoint")
    make_tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    report = verify_bundle(
        create_bundle(tmp_path / "checkpoint", tmp_path / "bundle", TEST_TEMPLATE, passage_tokens=64)
    )
    assert report.passed, report


def test_steps_in_eight_bits_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels() is None:
        pytest.skip("no compiled kernels on this machine")
    made = make_tiny_bundle(tmp_path / "wide", head_dim=32, hidden_size=64, intermediate_size=96)
    bundle = load_bundle(made, compute_dtype="bfloat16", kv_dtype="bfloat16", weights="int8")
    report = verify_bundle(bundle)
    assert report.weights == "int8"
    assert report.passed
    assert verify_bundle(replace(bundle, weights="none")).weights == "none"

    monkeypatch.setattr(step, "has_instructions", lambda names: False)  # then models in float32 have steps too
    report = verify_bundle(replace(bundle, compute_dtype="float32"))
    assert report.weights == "int8"
    assert report.passed

    class Damaged(Step):
        def __call__(self, input_ids: Tensor, batch: RaggedBatch, trace: list[Tensor] | None) -> Tensor | None:
            logits = super().__call__(input_ids, batch, trace)
            if trace and len(input_ids[0]) > 8:  # not in the probe at load
                trace[1] *= 1.5
            return logits

    monkeypatch.setattr("blockrag.modeling.model.Step", Damaged)
    failed = verify_bundle(bundle)
    assert {check.first_difference for check in failed.checks if not check.passed} == {"layer 1"}

    class Unsure(Step):
        def __call__(self, input_ids: Tensor, batch: RaggedBatch, trace: list[Tensor] | None) -> Tensor | None:
            logits = super().__call__(input_ids, batch, trace)
            return logits if logits is None or trace is not None or len(input_ids[0]) > 1 else 0.5 * logits

    monkeypatch.setattr("blockrag.modeling.model.Step", Unsure)
    failed = verify_bundle(bundle)
    unsure = [check for check in failed.checks if not check.passed]
    assert {check.first_difference for check in unsure} == {"probabilities"}
    assert {check.name.partition(",")[0] for check in unsure} >= {"block mode", "block mode shuffled"}


@pytest.mark.parametrize("layer", [0, 2])
def test_names_the_layer_where_a_store_damages_keys(tiny: Path, layer: int) -> None:
    def damage(block: BlockKV) -> BlockKV:
        keys = block.keys.copy()
        keys[layer] *= 1.5
        return replace(block, keys=keys)

    report = verify_bundle(tiny, through_store=damage)
    assert not report.passed
    failed = {check.name: check.first_difference for check in report.checks if not check.passed}
    assert set(failed) == {"block mode through the store, random tokens", "block mode through the store, text"}
    assert set(failed.values()) == {f"layer {layer}"}


def test_a_nan_is_a_difference(tiny: Path) -> None:
    def damage(block: BlockKV) -> BlockKV:
        values = block.values.copy()
        values[1] = np.nan
        return replace(block, values=values)

    report = verify_bundle(tiny, through_store=damage, texts=["One passage."])
    assert {check.first_difference for check in report.checks if not check.passed} == {"layer 1"}


def test_block_mask() -> None:
    allowed = block_mask([2, 1], 2)[0, 0].int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    with pytest.raises(ValueError, match="at least one token"):
        block_mask([2, 0], 1)
