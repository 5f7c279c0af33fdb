from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockrag.errors import BundleError
from blockrag.modeling.adapter import Adapter, merge_adapter
from blockrag.modeling.adapter_record import AdapterConfig
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.model import load_stock_model
from blockrag.modeling.verify import verify_bundle
from blockrag.training.adaptation.block import adapt_block
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.adaptation.source import Source, load_for_training, open_source, write_bundle
from tests.gguf_files import install_package, make_tiny_gguf, tiny_gguf_model
from tests.models import make_tiny_bundle

Make = Callable[..., BlockAdaptConfig]
TRAINING: dict[str, Any] = {
    "recipe": {
        "distillation": 0.0,
        "link_tokens": 0,
        "sink_tokens": 0,
        "train": "all",
        "lora_rank": 0,
        "questions": 1,
        "masks": "both",
        "steps": 1,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "min_passages": 1,
        "max_passages": 2,
        "refusal_share": 0.0,
    },
    "tokens": 1,
    "seconds": 1,
    "data": [],
    "base": "none",
}
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "tiny.gguf", tiny_gguf_model(max_position_embeddings=512))


def adapter(width: int = 32) -> Adapter:
    torch.manual_seed(0)
    pair = torch.randn(4, width).bfloat16().float(), torch.randn(32, 4).bfloat16().float()
    return Adapter(AdapterConfig(rank=4, alpha=8.0, target_modules=("q_proj",)), {QUERY: pair})


def write_adapted(config: BlockAdaptConfig, source: Source, given: Adapter) -> Path:
    model, tokenizer, _ = load_for_training(source, config, with_adapter=False)
    return write_bundle(model.state_dict(), tokenizer, source, config, TRAINING, {}, given)


def test_a_package_and_its_file_are_one_source(
    gguf: Path, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_package(tmp_path / "site", gguf)
    monkeypatch.syspath_prepend(tmp_path / "site")
    from_file, from_package = (open_source(config(model=Path(name))) for name in (gguf, "package:tiny-model"))
    assert from_file.checkpoint == from_package.checkpoint
    assert from_file.fingerprint() == from_package.fingerprint()
    assert from_file.dtype == torch.bfloat16 and from_file.adapter is None
    assert from_file.template.end == "<|end|>"


def test_a_gguf_file_is_trained_whole(gguf: Path, config: Make) -> None:
    bundle = load_bundle(adapt_block(config(model=gguf)))
    assert bundle.base is None
    assert bundle.training["base"] == open_source(config(model=gguf)).fingerprint()
    assert verify_bundle(bundle).passed


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_an_adapter_is_written_on_its_base_and_goes_on(
    kind: str, gguf: Path, checkpoint: Path, config: Make, tmp_path: Path
) -> None:
    start = config(model=gguf if kind == "gguf" else checkpoint)
    source = open_source(start)

    bundle = load_bundle(write_adapted(start, source, adapter()))

    assert bundle.base is not None and bundle.base.to_dict().keys() & {"gguf", "directory"} == {kind}
    assert bundle.token_rows is None
    merged = load_stock_model(bundle).get_parameter(f"{QUERY}.weight")
    base = load_stock_model(bundle, with_adapter=False).get_parameter(f"{QUERY}.weight")
    down, up = adapter().tensors[QUERY]
    assert torch.allclose(merged, base + 2.0 * up @ down, atol=1e-5)

    again = config(model=bundle.path, out=tmp_path / "again" / "bundle")
    further = open_source(again)
    assert further.adapter is not None and further.base is not None and further.base.content == bundle.base.content
    assert torch.equal(further.adapter.tensors[QUERY][0].float(), down)
    model, _, _ = load_for_training(further, again, with_adapter=False)
    assert torch.equal(model.get_parameter(f"{QUERY}.weight"), base)
    assert load_bundle(write_adapted(again, further, further.adapter)).fingerprint == bundle.fingerprint
    # and whole weights can be trained from it as from any bundle
    whole = config(model=bundle.path, out=tmp_path / "whole", steps=1, dev_rows=0, learning_rate=1e-12)
    trained = load_bundle(adapt_block(whole))
    assert trained.base is None
    kept = load_stock_model(trained).get_parameter(f"{QUERY}.weight")
    assert torch.allclose(kept, merged.to(source.dtype).float(), atol=1e-4)


def test_link_tokens_become_rows(gguf: Path, config: Make) -> None:
    start = config(model=gguf, link_tokens=2, sink_tokens=1)
    source = open_source(start)
    bundle = load_bundle(write_adapted(start, source, adapter()))
    model, _, ids = load_for_training(source, start)
    assert ids == [300, 301, 302]
    assert (bundle.vocab_size, bundle.token_rows) == (303, {"first": 300, "count": 3})
    rows = model.get_input_embeddings().weight[300:].to(torch.bfloat16).float()
    assert torch.equal(load_stock_model(bundle).get_input_embeddings().weight[300:], rows)
    assert verify_bundle(bundle).passed


def test_an_adapter_on_a_bundle_with_weights_of_its_own_is_merged_into_them(config: Make, tmp_path: Path) -> None:
    start = config(model=make_tiny_bundle(tmp_path / "base", max_position_embeddings=512))
    bundle = load_bundle(write_adapted(start, open_source(start), adapter()))

    expected = load_stock_model(load_bundle(start.model))
    merge_adapter(expected, adapter())
    assert bundle.base is None and bundle.adapter is None
    for (name, found), wanted in zip(
        load_stock_model(bundle).state_dict().items(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6, msg=name)


def test_a_file_that_is_missing_is_named(config: Make, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.gguf: no such model"):
        open_source(config(model=tmp_path / "absent.gguf"))
    with pytest.raises(BundleError, match=r"needs the package no-such-model"):
        open_source(config(model=Path("package:no-such-model")))
