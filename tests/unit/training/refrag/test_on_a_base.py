"""Stages that start from a base with an adapter on it add to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import SetupError
from blockrag.modeling.adapter_record import ADAPTER_FILES
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.bundle_writing import write_pear
from blockrag.modeling.pear_record import HeadCoefficient
from blockrag.training.refrag.stage_config import RefragConfig
from blockrag.training.refrag.stages import adapt_refrag
from tests.models import make_tiny_checkpoint
from tests.unit.modeling.test_adapter import make_bundle
from tests.unit.modeling.test_pear import RECORD

Make = Callable[..., RefragConfig]


@pytest.fixture
def start(tmp_path: Path) -> Bundle:
    """A base, an adapter of rank 4 on it and a coefficient of a head."""
    make_tiny_checkpoint(tmp_path / "checkpoint", max_position_embeddings=1024)
    record = replace(RECORD, heads=(HeadCoefficient(layer=1, head=2, tau=0.5, delta_pi=-0.1),))
    return write_pear(make_bundle(tmp_path), record, tmp_path / "start")


def adapted(config: RefragConfig) -> tuple[Bundle, dict[str, Any]]:
    """What a stage made, and what the manifest says of it."""
    made = load_bundle(adapt_refrag(config))
    assert made.refrag is not None
    return made, dict(made.refrag.training[-1])


def test_a_frozen_decoder_stays_as_it_is(config: Make, start: Bundle) -> None:
    made, _ = adapted(config(stage="reconstruction", bundle=start.path))
    assert made.fingerprint == start.fingerprint
    assert (made.adapter, made.pear) == (start.adapter, start.pear)
    for name in start.decoder_files:
        assert (made.path / name).read_bytes() == (start.path / name).read_bytes()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_is_learnt_is_joined_with_the_adapter(config: Make, start: Bundle, tmp_path: Path, optimizer: str) -> None:
    made, first = adapted(
        config(bundle=start.path, lora_rank=3, steps=6, optimizer=optimizer, decoder_learning_rate=0.03)
    )
    assert made.base is not None and made.adapter is not None and made.pear == start.pear
    assert made.adapter.rank == 7
    assert not list(made.path.glob("decoder/*.safetensors"))
    for name in start.decoder_files:
        if name not in ADAPTER_FILES:
            assert (made.path / name).read_bytes() == (start.path / name).read_bytes()

    # the next stage begins where this one ended, which was measured with the weights that were trained
    _, second = adapted(config(bundle=made.path, chunk_tokens=None, steps=1, out=tmp_path / "next"))
    for label, scores in first["after"].items():
        assert scores["nats"] == pytest.approx(second["before"][label]["nats"], abs=2e-4)
    change = first["after"]["text, full"]["nats"] - first["before"]["text, full"]["nats"]
    assert abs(change) > 5e-3


def test_the_bases_own_layers_read_chunks_for_a_decoder_that_learns(
    config: Make, start: Bundle, tmp_path: Path
) -> None:
    made, first = adapted(config(bundle=start.path, encoder="decoder:1", lora_rank=3, decoder_learning_rate=0.03))
    assert made.refrag is not None and made.refrag.alignment == "decoder"
    assert made.adapter is not None and made.adapter.rank == 7
    _, second = adapted(config(bundle=made.path, chunk_tokens=None, train_decoder=False, out=tmp_path / "next"))
    for label, scores in first["after"].items():
        assert scores["nats"] == pytest.approx(second["before"][label]["nats"], abs=2e-4)
    with pytest.raises(SetupError, match="must stay as they are"):
        adapt_refrag(config(bundle=made.path, chunk_tokens=None, out=tmp_path / "other"))


def test_into_weights_of_its_own_it_is_merged(config: Make, tmp_path: Path) -> None:
    made, first = adapted(config(lora_rank=3, steps=6))
    assert (made.base, made.adapter) == (None, None)
    _, second = adapted(config(bundle=made.path, chunk_tokens=None, steps=1, out=tmp_path / "next"))
    assert first["after"]["text, block"]["nats"] == pytest.approx(second["before"]["text, block"]["nats"], abs=2e-4)


@pytest.mark.parametrize("changes", [{"train_decoder": False}, {"average_with": Path("x")}, {"lora_rank": -1}])
def test_a_rank_without_use_is_refused(config: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="lora_rank"):
        config(**{"lora_rank": 2, **changes})
