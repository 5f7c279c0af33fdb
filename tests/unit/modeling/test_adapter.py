from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from blockrag.errors import BundleError
from blockrag.modeling.adapter import (
    Adapter,
    TokenRows,
    join_adapters,
    merge_adapter,
    put_token_rows,
    read_adapter,
    write_adapter,
)
from blockrag.modeling.adapter_record import AdapterConfig
from blockrag.modeling.base import open_base
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.bundle_writing import create_bundle, write_pear
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.pear_record import HeadCoefficient
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.modeling.refrag.refrag_writing import write_refrag
from blockrag.modeling.verify import verify_bundle
from tests.models import TEST_TEMPLATE, TINY_VOCAB, make_tiny_checkpoint, make_tiny_model
from tests.unit.modeling.test_bundle import change_manifest, sign_again
from tests.unit.modeling.test_pear import RECORD

CONFIG = AdapterConfig(rank=4, alpha=6.0, target_modules=("down_proj", "q_proj"))


def random_tensors(model: PreTrainedModel, config: AdapterConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in config.target_modules:
            assert isinstance(module, torch.nn.Linear)
            down = torch.randn(config.rank, module.in_features, generator=generator)
            found[name] = down, 0.3 * torch.randn(module.out_features, config.rank, generator=generator)
    return found


def make_bundle(root: Path, *, seed: int = 0, **options: Any) -> Bundle:
    """``root/bundle-SEED`` with a random adapter on ``root/checkpoint``."""
    if not (root / "checkpoint").exists():
        make_tiny_checkpoint(root / "checkpoint")
    out = root / f"bundle-{seed}"
    adapter = Adapter(CONFIG, random_tensors(make_tiny_model(), seed=seed))
    base = open_base(root / "checkpoint", out)
    return create_bundle(root / "checkpoint", out, TEST_TEMPLATE, base=base, adapter=adapter, **options)


def largest_difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
class TestPeft:
    """The files are PEFT's, and merging is PEFT's too."""

    def test_peft_loads_what_was_written(self, tmp_path: Path) -> None:
        write_adapter(tmp_path, Adapter(CONFIG, random_tensors(make_tiny_model())), "sha256:0")
        ours = make_tiny_model()

        merge_adapter(ours, read_adapter(tmp_path))

        theirs = PeftModel.from_pretrained(make_tiny_model(), str(tmp_path)).merge_and_unload()
        assert largest_difference(ours, theirs) < 1e-6
        assert largest_difference(ours, make_tiny_model()) > 0.1

    def test_what_peft_wrote_is_read(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "up_proj"]}
        adapted = get_peft_model(make_tiny_model(), LoraConfig(task_type="CAUSAL_LM", **options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(str(tmp_path))

        ours, adapter = make_tiny_model(), read_adapter(tmp_path)
        merge_adapter(ours, adapter)

        assert adapter.config == AdapterConfig(rank=3, alpha=5.0, target_modules=("up_proj", "v_proj"))
        assert largest_difference(ours, adapted.merge_and_unload()) < 1e-6

    def test_a_bundles_weights_are_those_that_peft_merges(self, tmp_path: Path) -> None:
        bundle = make_bundle(tmp_path)
        stock = make_tiny_model()
        merged = PeftModel.from_pretrained(stock, str(bundle.adapter_dir)).merge_and_unload()
        assert largest_difference(load_stock_model(bundle), merged) < 1e-6
        assert largest_difference(load_stock_model(bundle, with_adapter=False), make_tiny_model()) == 0.0


def test_joined_adapters_are_merged_as_one_after_the_other() -> None:
    config = AdapterConfig(rank=2, alpha=5.0, target_modules=("o_proj", "q_proj"))
    first = Adapter(CONFIG, random_tensors(make_tiny_model()))
    second = Adapter(config, random_tensors(make_tiny_model(), config, seed=1))
    joined = join_adapters(first, second)
    assert (joined.config.rank, joined.config.target_modules) == (6, ("down_proj", "o_proj", "q_proj"))
    for name, (down, up) in first.tensors.items():
        assert torch.equal(joined.tensors[name][0][:4], down) and torch.equal(joined.tensors[name][1][:, :4], up)
    apart, together = make_tiny_model(), make_tiny_model()
    for adapter in (first, second):
        merge_adapter(apart, adapter)
    merge_adapter(together, joined)
    assert largest_difference(apart, together) < 1e-5 < 0.1 < largest_difference(apart, make_tiny_model())
    assert join_adapters(None, first) is first


def test_a_merge_is_rounded_once(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    exact = load_stock_model(bundle, compute_dtype="float32")
    narrow = load_stock_model(bundle, compute_dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    assert narrow.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, parameter in narrow.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).to(torch.bfloat16)), name


def test_a_bundle_with_an_adapter_is_served(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    assert not list(bundle.path.glob("decoder/*.safetensors"))
    assert bundle.adapter == CONFIG and bundle.base is not None
    assert bundle.base.directory == "../checkpoint"
    assert SlotModel.load(bundle).end_token_ids == {2}
    assert verify_bundle(bundle).passed


def test_loading_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    assert bundle.base is not None
    load_stock_model(bundle)
    bundle.base.check(bundle.path, verify_files=True)


def test_fingerprints_count_what_is_merged(tmp_path: Path) -> None:
    one, other = make_bundle(tmp_path), make_bundle(tmp_path, seed=1)
    base = open_base(tmp_path / "checkpoint", tmp_path / "plain")
    plain = create_bundle(tmp_path / "checkpoint", tmp_path / "plain", TEST_TEMPLATE, base=base)
    make_tiny_checkpoint(tmp_path / "elsewhere" / "checkpoint", seed=1)
    elsewhere = make_bundle(tmp_path / "elsewhere")
    bundles = (one, other, plain, elsewhere)
    assert (
        len({bundle.fingerprint for bundle in bundles}) == len({bundle.decoder_fingerprint for bundle in bundles}) == 4
    )
    (tmp_path / "moved").mkdir()
    for name in ("checkpoint", "bundle-0"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert load_bundle(tmp_path / "moved" / "bundle-0").fingerprint == one.fingerprint


def test_coefficients_are_folded_after_the_adapter(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    record = replace(RECORD, heads=(HeadCoefficient(layer=1, head=2, tau=0.5, delta_pi=-0.1),))
    out = write_pear(bundle, record, tmp_path / "deeper" / "pear")
    assert out.base is not None and out.base.directory == str(tmp_path / "checkpoint")
    name = "model.layers.1.self_attn.o_proj.weight"
    before, after = (load_stock_model(one).get_parameter(name) for one in (bundle, out))
    assert torch.equal(after[:, 16:24], before[:, 16:24] * 0.5)
    with pytest.raises(BundleError, match="do not fit the base without the adapter"):
        load_stock_model(out, with_adapter=False)


def test_chunks_are_compressed_on_a_base(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    parts: dict[str, Any] = {
        "encoder": ChunkEncoder.for_tokens(TINY_VOCAB, None, width=16, layers=1, heads=2, max_chunk=8),
        "projector": Projector(16, 32),
        "chunk_tokens": 4,
    }

    out = write_refrag(bundle, tmp_path / "deeper" / "out", **parts)

    assert (out.adapter, out.fingerprint) == (bundle.adapter, bundle.fingerprint)
    assert largest_difference(load_stock_model(out), load_stock_model(bundle)) == 0.0
    weights = load_stock_model(bundle).state_dict()
    whole = write_refrag(bundle, tmp_path / "whole", decoder=weights, **parts)
    assert (whole.base, whole.adapter) == (None, None)
    assert largest_difference(load_stock_model(whole), load_stock_model(bundle)) == 0.0


class TestTokenRows:
    def rows(self, first: int = TINY_VOCAB, count: int = 2, **changes: Any) -> TokenRows:
        return replace(TokenRows(first, torch.arange(count * 32.0).reshape(count, 32)), **changes)

    @pytest.mark.parametrize("first", [TINY_VOCAB, TINY_VOCAB - 1])
    def test_rows_are_put_at_their_ids(self, first: int, tmp_path: Path) -> None:
        model = make_tiny_model()
        put_token_rows(model, self.rows(first), first + 2, tmp_path)
        embedding = model.get_input_embeddings().weight
        assert model.config.vocab_size == first + 2
        assert torch.equal(embedding[first:], self.rows().embedding)
        assert torch.equal(embedding[:first], make_tiny_model().get_input_embeddings().weight[:first])
        assert model.get_output_embeddings().weight is embedding

    def test_an_untied_head_has_rows_of_its_own(self, tmp_path: Path) -> None:
        model = make_tiny_model(tie_word_embeddings=False)
        put_token_rows(model, self.rows(head=torch.ones(2, 32)), TINY_VOCAB + 2, tmp_path)
        assert torch.equal(model.get_output_embeddings().weight[TINY_VOCAB:], torch.ones(2, 32))
        with pytest.raises(BundleError, match="lacks head"):
            put_token_rows(make_tiny_model(tie_word_embeddings=False), self.rows(), TINY_VOCAB + 2, tmp_path)

    @pytest.mark.parametrize(
        ("first", "vocabulary", "problem"),
        [(301, 303, "grows from 300 to 303"), (300, 303, "grows from 300"), (300, 301, "grows from 300 to 301")],
    )
    def test_rows_that_leave_a_gap_are_refused(self, first: int, vocabulary: int, problem: str, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=problem):
            put_token_rows(make_tiny_model(), self.rows(first), vocabulary, tmp_path)

    def test_a_bundle_keeps_them(self, tmp_path: Path) -> None:
        make_tiny_checkpoint(tmp_path / "checkpoint")
        small = tmp_path / "small"
        small.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (small / name).write_bytes((tmp_path / "checkpoint" / name).read_bytes())
        config = json.loads((small / "config.json").read_text())
        (small / "config.json").write_text(json.dumps({**config, "vocab_size": 302}))
        base = open_base(tmp_path / "checkpoint", tmp_path / "out")

        bundle = create_bundle(small, tmp_path / "out", TEST_TEMPLATE, base=base, token_rows=self.rows())

        assert (bundle.vocab_size, bundle.token_rows) == (302, {"first": 300, "count": 2})
        assert torch.equal(load_stock_model(bundle).get_input_embeddings().weight[300:], self.rows().embedding)
        change_manifest(bundle.path, lambda manifest: manifest["token_rows"].update(count=3))
        with pytest.raises(BundleError, match="2 rows, where the manifest has 3"):
            load_bundle(bundle.path)


def change_tensors(root: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    sign_again(root)


def change_config(root: Path, **values: Any) -> None:
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    sign_again(root)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.full((32, 4), torch.nan)}), "NaN or infinity"),
        (lambda tensors: tensors.pop(f"{Q}.lora_A.weight"), "has lora_B alone"),
        (lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(3, 32)}), "where the rank is 4"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}), r"norm\.weight is no tensor of a LoRA"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "q_proj" in name],
            "adapts down_proj, where the configuration says down_proj, q_proj",
        ),
        (lambda tensors: tensors.clear(), "holds no adapted layer"),
    ],
)
def test_refuses_bad_tensors(change: Callable[[dict[str, Tensor]], Any], problem: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    change_tensors(bundle.path, change)
    with pytest.raises(BundleError, match=rf"adapter_model\.safetensors: .*{problem}"):
        load_bundle(bundle.path)
    with pytest.raises(BundleError, match=problem):
        load_stock_model(load_bundle(bundle.path, verify_files=False))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"r": 8}, "rank=8.*where the manifest has.*rank=4"),
        ({"lora_alpha": 7}, "alpha=7.*where the manifest has.*alpha=6"),
        ({"target_modules": ["q_proj"]}, "where the manifest has"),
        ({"base_model_name_or_path": "sha256:" + "0" * 64}, "made for another base: sha256:0000"),
        ({"use_dora": True, "bias": "all"}, "use_dora, bias cannot be read"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; LORA can be read"),
        ({"target_modules": "all-linear"}, "must name linear layers"),
    ],
)
def test_refuses_another_configuration(values: dict[str, Any], problem: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    change_config(bundle.path, **values)
    with pytest.raises(BundleError, match=rf"adapter_config\.json: .*{problem}"):
        load_bundle(bundle.path, verify_files=False)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"intermediate_size": 40}, r"down_proj is of shape \[32, 40\], the adapter's product \[32, 48\]"),
        ({"num_hidden_layers": 2}, r"this one has no linear layer model\.layers\.2\."),
    ],
)
def test_refuses_a_model_that_it_does_not_fit(overrides: dict[str, Any], problem: str, tmp_path: Path) -> None:
    model = make_tiny_model(**overrides)
    with pytest.raises(BundleError, match=f"made for another base: .*{problem}"):
        merge_adapter(model, Adapter(CONFIG, random_tensors(make_tiny_model())))
    assert largest_difference(model, make_tiny_model(**overrides)) == 0.0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda manifest: manifest.pop("base"), "adapter without the base that it was made for"),
        (lambda manifest: manifest["adapter"].update(rank=0), "adapter rank 0"),
        (lambda manifest: manifest["adapter"].update(alpha="6"), "adapter alpha '6'"),
        (lambda manifest: manifest["adapter"].pop("rank"), "adapter: must have the keys"),
        (lambda manifest: manifest["files"].pop("adapter/adapter_config.json"), "files lacks adapter/adapter_config"),
        (lambda manifest: manifest.update(token_rows={"first": 300, "count": 1}), "files lacks token_rows"),
        (lambda manifest: manifest["base"].update(gguf="x"), "base must have the keys"),
        (lambda manifest: manifest["base"].update(directory=""), r"base\.directory must be a text"),
        (lambda manifest: manifest["base"].update(files={}), r"base\.files must name weights"),
        (lambda manifest: manifest["base"].update(directory="../gone"), "gone: no such directory; it is the base of"),
    ],
)
def test_refuses_a_wrong_manifest(change: Callable[[dict[str, Any]], Any], problem: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    change_manifest(bundle.path, change)
    with pytest.raises(BundleError, match=problem):
        load_bundle(bundle.path, verify_files=False)


def test_refuses_weights_beside_a_base(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (bundle.path / "decoder" / "model.safetensors").write_bytes(
        (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    )
    change_manifest(bundle.path, lambda manifest: manifest["files"].update({"decoder/model.safetensors": "0" * 64}))
    with pytest.raises(BundleError, match=r"both a base and weights of its own: decoder/model\.safetensors"):
        load_bundle(bundle.path)


def test_refuses_a_directory_that_has_changed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    make_tiny_model(seed=1).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(BundleError, match=r"checkpoint/model\.safetensors: content differs"):
        load_bundle(bundle.path)
