from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.masks import block_mask
from blockrag.modeling.verify import verify_bundle
from blockrag.types import BlockKV
from tests.models import FAMILIES, make_tiny_bundle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_model_passes(family: str, tmp_path: Path) -> None:
    report = verify_bundle(make_tiny_bundle(tmp_path / family, family=family))
    assert report.passed
    assert [check.name for check in report.checks] == [
        f"{mode}, {source}"
        for source in ("random tokens", "text")
        for mode in ("full mode", "block mode", "block mode shuffled", "block mode through the store")
    ]
    assert all(0 <= check.max_difference < check.tolerance for check in report.checks)


def test_wider_tolerances_for_bfloat16(tiny: Path) -> None:
    report = verify_bundle(load_bundle(tiny, compute_dtype="bfloat16", kv_dtype="bfloat16"))
    assert report.passed
    assert report.relative_tolerance > 100 * verify_bundle(tiny).relative_tolerance


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
