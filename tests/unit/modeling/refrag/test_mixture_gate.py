from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.refrag import mixture_gate
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.modeling.slots import SlotSlice
from blockrag.modeling.verify import VerifyReport, verify_bundle
from blockrag.types import BlockKV
from tests.models import FAMILIES, make_tiny_refrag_bundle

CHECKS = (
    "chunk embeddings",
    "mixture",
    "mixture shuffled",
    "mixture through the store",
    "mixture re-encoded",
    "nothing compressed is block mode",
    "all compressed is the compressed pass",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_refrag_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def failed(report: VerifyReport) -> dict[str, str]:
    return {check.name.split(",")[0]: check.first_difference for check in report.checks if not check.passed}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_bundle_passes(family: str, tmp_path: Path) -> None:
    report = verify_bundle(make_tiny_refrag_bundle(tmp_path / family, family=family))
    assert failed(report) == {}
    found = [check for check in report.checks if check.name.split(",")[0] in CHECKS]
    assert [check.name for check in found] == [
        f"{name}, {source}" for source in ("random tokens", "text") for name in CHECKS
    ]
    for check in found:
        if " is " in check.name:
            assert check.max_difference == check.tolerance == 0
        else:
            assert 0 <= check.max_difference < check.tolerance


@pytest.mark.parametrize("chunk_tokens", [1, 3, 16])
@pytest.mark.parametrize("alignment", ["tokens", "text"])
def test_any_chunk_length_and_alignment_passes(chunk_tokens: int, alignment: Any, tmp_path: Path) -> None:
    path = make_tiny_refrag_bundle(tmp_path / "made", chunk_tokens=chunk_tokens, alignment=alignment, policies=())
    assert failed(verify_bundle(path, texts=["One passage, longer than a chunk.", "Hm."])) == {}


def test_yarn_passes(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert failed(verify_bundle(make_tiny_refrag_bundle(tmp_path / "made", rope_parameters=rope))) == {}


def test_bfloat16_passes_within_its_tolerance(tiny: Path) -> None:
    assert failed(verify_bundle(load_bundle(tiny, kv_dtype="bfloat16"))) == {}


@pytest.mark.parametrize("layer", [0, 2])
def test_names_the_layer_where_a_store_damages_compressed_blocks(tiny: Path, layer: int) -> None:
    def damage(block: BlockKV) -> BlockKV:
        if block.num_slots == len(block.token_ids):
            return block
        values = block.values.copy()
        values[layer] *= 1.5
        return replace(block, values=values)

    assert failed(verify_bundle(tiny, through_store=damage)) == {"mixture through the store": f"layer {layer}"}


@pytest.mark.parametrize("fault", ["order", "neighbour", "form"])
def test_finds_faults_of_composition(tiny: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mixture_gate.compose_passage

    def wrong(full: Any, compressed: Any, expanded: Sequence[bool], chunk_tokens: int) -> list[SlotSlice]:
        pieces = right(full, compressed, expanded, chunk_tokens)
        if len(pieces) < 2:
            return pieces
        if fault == "order":
            return [pieces[1], pieces[0], *pieces[2:]]
        if fault == "form":
            return right(full, compressed, [not keep for keep in expanded], chunk_tokens)
        return [
            replace(piece, start=piece.start - 1, stop=piece.stop - 1) if piece.start else piece for piece in pieces
        ]

    monkeypatch.setattr(mixture_gate, "compose_passage", wrong)
    found = failed(verify_bundle(tiny))
    assert set(found) == {"mixture", "mixture shuffled", "mixture through the store"}
    assert set(found.values()) == {"layer 0"}


def test_finds_a_wrong_mean_over_padded_chunks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ChunkCompressor.embed
    monkeypatch.setattr(ChunkCompressor, "embed", lambda self, blocks: [1.01 * found for found in right(self, blocks)])
    assert failed(verify_bundle(tiny)) == {"chunk embeddings": "chunk embeddings"}
