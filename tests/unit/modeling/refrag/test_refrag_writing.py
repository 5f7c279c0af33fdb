from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockrag.errors import BundleError
from blockrag.modeling.bundle import Bundle, file_sha256, load_bundle
from blockrag.modeling.bundle_writing import with_section, write_pear
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.pear_record import HeadCoefficient, PearRecord, ProxyScore
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import ChunkCompressor, Projector
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyConfig
from blockrag.modeling.refrag.record import policy_file
from blockrag.modeling.refrag.refrag_writing import PolicyPart, write_refrag
from tests.models import TINY_VOCAB, make_tiny_bundle, make_tiny_refrag_bundle

PEAR = PearRecord(
    heads=(HeadCoefficient(1, 2, 0.5, 0.1),),
    mask="block",
    mean="sequence",
    later_heads="live",
    sizes=((4, 8),),
    distractors=1,
    n=8,
    steps=1,
    batch=2,
    learning_rate=1e-3,
    seed=0,
    before={"block": ProxyScore(2.0, 0.1)},
    after={"block": ProxyScore(1.0, 0.2)},
)


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "plain")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_refrag_bundle(tmp_path_factory.mktemp("bundles") / "refrag")


@pytest.fixture
def bundle_dir(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def encoder(width: int = 16, vocab: int = TINY_VOCAB, max_chunk: int = 8) -> ChunkEncoder:
    return ChunkEncoder.for_tokens(vocab, None, width=width, layers=1, heads=2, max_chunk=max_chunk)


def change_manifest(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def sign_again(root: Path) -> None:
    change_manifest(root, lambda it: it.update(files={name: file_sha256(root / name) for name in it["files"]}))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("alignment", ["tokens", "text"])
def test_loads_what_it_wrote(alignment: Any, tmp_path: Path, plain_dir: Path) -> None:
    bundle = load_bundle(make_tiny_refrag_bundle(tmp_path / "made", alignment=alignment, pooling="cls"))
    plain = load_bundle(plain_dir)
    assert bundle.refrag is not None
    assert (bundle.refrag.alignment, bundle.refrag.pooling, bundle.refrag.encoder_width) == (alignment, "cls", 16)
    assert (bundle.chunk_tokens, plain.chunk_tokens) == (4, 16)
    assert bundle.fingerprint == plain.fingerprint, "full blocks stay in the cache"
    assert bundle.refrag.decoder == bundle.decoder_fingerprint == plain.decoder_fingerprint
    assert {name: policy.query for name, policy in bundle.refrag.policies.items()} == {"query": True, "blind": False}
    assert ChunkPolicy.load(bundle.path / policy_file("blind")).config.encoder_width == 16
    compressor = ChunkCompressor.load(bundle)
    (found,) = compressor.project(compressor.embed([list(range(20, 31))]))
    assert found.shape == (3, 32)
    assert "## Chunk compression (REFRAG)" in (bundle.path / "MODEL_CARD.md").read_text()


def test_fingerprints_count_what_they_should(pristine: Path, tmp_path: Path) -> None:
    bundle = load_bundle(pristine)
    wide = load_bundle(pristine, kv_dtype="bfloat16")
    assert wide.compression_fingerprint != bundle.compression_fingerprint
    assert (wide.decoder_fingerprint, wide.policy_basis) == (bundle.decoder_fingerprint, bundle.policy_basis)
    others = {
        "k": write_refrag(bundle, tmp_path / "k", chunk_tokens=5, policies={}),
        "encoder": write_refrag(bundle, tmp_path / "encoder", encoder=encoder(), policies={}),
        "projector": write_refrag(bundle, tmp_path / "projector", projector=Projector(16, 32), policies={}),
    }
    for key in ("compression_fingerprint", "policy_basis"):
        assert len({getattr(found, key) for found in (bundle, *others.values())}) == 4, key
    assert {found.fingerprint for found in others.values()} == {bundle.fingerprint}
    same = write_refrag(bundle, tmp_path / "same", policies={}, name="renamed", training=[{"stage": "x"}])
    assert same.compression_fingerprint == bundle.compression_fingerprint
    assert (same.name, same.version) == ("renamed", bundle.version)
    assert same.refrag is not None and same.refrag.training == ({"stage": "x"},)
    assert "- stage x" in (same.path / "MODEL_CARD.md").read_text()


def test_whoever_serves_it_can_read_it(pristine: Path) -> None:
    modes = {path.relative_to(pristine).as_posix(): path.stat().st_mode & 0o777 for path in pristine.rglob("*")}

    assert {name for name in modes if "." in name} >= {
        "manifest.json",
        "projector.safetensors",
        "policy-query.safetensors",
    }
    assert all(mode == (0o644 if "." in name else 0o755) for name, mode in modes.items())


def test_a_bundle_without_it_says_so(plain_dir: Path, tmp_path: Path) -> None:
    plain = load_bundle(plain_dir)
    assert plain.refrag is None
    for use in (
        lambda: plain.compression_fingerprint,
        lambda: plain.policy_basis,
        lambda: ChunkCompressor.load(plain),
        lambda: write_refrag(plain, tmp_path / "out", encoder=encoder()),
    ):
        with pytest.raises(BundleError, match="no chunk compression"):
            use()


def test_replaces_the_decoder_and_keeps_its_type_and_tokenizer(tmp_path: Path) -> None:
    plain = load_bundle(make_tiny_bundle(tmp_path / "plain"))
    pear = write_pear(plain, PEAR, tmp_path / "pear")
    model = load_stock_model(pear)  # with the coefficients in its weights
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    parts: dict[str, Any] = {"encoder": encoder(), "projector": Projector(16, 32), "chunk_tokens": 4}
    made = write_refrag(pear, tmp_path / "made", decoder=model.state_dict(), **parts)
    assert made.pear is None
    assert made.quality == {}
    again = load_stock_model(made)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, msg=name)
    assert (made.path / "decoder/config.json").read_bytes() == (plain.path / "decoder/config.json").read_bytes()
    assert made.decoder_fingerprint != plain.decoder_fingerprint
    assert SlotModel.load(made).end_token_ids == {2}
    kept = write_refrag(pear, tmp_path / "kept", **parts)
    assert kept.pear == PEAR
    assert kept.fingerprint == pear.fingerprint


def test_policies_are_kept_only_with_their_parts(pristine: Path, tmp_path: Path) -> None:
    bundle = load_bundle(pristine)
    assert bundle.refrag is not None
    same = write_refrag(bundle, tmp_path / "same")
    assert same.refrag is not None and same.refrag.policies == bundle.refrag.policies
    with pytest.raises(BundleError, match=r"the policy 'query' was trained with other parts .* train it again"):
        write_refrag(bundle, tmp_path / "changed", projector=Projector(16, 32))
    part = PolicyPart(ChunkPolicy(PolicyConfig(encoder_width=16, query=False)), basis=bundle.policy_basis)
    write_refrag(bundle, tmp_path / "right", policies={"mine": part})
    with pytest.raises(BundleError, match="the policy 'mine' was trained with other parts"):
        write_refrag(bundle, tmp_path / "wrong", policies={"mine": replace(part, basis="0" * 40)})
    assert names_in(tmp_path) == ["right", "same"]


def test_leaves_nothing_behind_when_a_part_does_not_fit(plain_dir: Path, tmp_path: Path) -> None:
    plain = load_bundle(plain_dir)
    damaged, broken = encoder(), Projector(16, 32)
    with torch.no_grad():
        damaged.encoder.embeddings.word_embeddings.weight[3, 4] = torch.nan
        broken.second.bias[2] = torch.inf
    policy = ChunkPolicy(PolicyConfig(encoder_width=16, query=True))
    torch.nn.init.constant_(policy.score.bias, torch.nan)
    narrow = ChunkPolicy(PolicyConfig(encoder_width=8, query=True))
    weights = load_stock_model(plain).state_dict()
    first = next(iter(weights))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"encoder": damaged}, r"model\.safetensors: NaN or infinity in .*word_embeddings"),
        ({"projector": broken}, r"projector\.safetensors: NaN or infinity in second\.bias"),
        ({"policies": {"query": PolicyPart(policy)}}, r"policy-query\.safetensors: NaN or infinity in score\.bias"),
        ({"policies": {"query": PolicyPart(narrow)}}, "a policy for 8 numbers a chunk"),
        ({"policies": {"Best one": PolicyPart(ChunkPolicy(PolicyConfig(16, False)))}}, "a name is made of"),
        ({"encoder": encoder(width=8)}, "projects 16 to 32 numbers, where the chunk encoder gives 8"),
        ({"projector": Projector(16, 31)}, "projects 16 to 31 numbers, .* the decoder takes 32"),
        ({"encoder": encoder(vocab=TINY_VOCAB - 1)}, "a vocabulary of 299, where the decoder has 300"),
        ({"chunk_tokens": 9}, "8 positions, where a chunk has 9 tokens"),
        ({"chunk_tokens": 0}, "chunk_tokens 0: must be at least 1"),
        ({"decoder": {**weights, first: weights[first] * torch.nan}}, f"NaN or infinity in {first}"),
        ({"decoder": {first: weights[first]}}, "do not fit .*layers.0"),
        ({"decoder": {**weights, first: torch.zeros(3, 3)}}, "do not fit"),
        ({"decoder": {**weights, "model.extra": torch.zeros(3)}}, "do not fit .*model.extra"),
    ]
    for change, problem in cases:
        parts = {"encoder": encoder(), "projector": Projector(16, 32), "chunk_tokens": 4, **change}
        with pytest.raises(BundleError, match=problem):
            write_refrag(plain, tmp_path / "out", **parts)
        assert names_in(tmp_path) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        write_refrag(plain, tmp_path / "out", encoder=encoder(), projector=Projector(16, 32))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda it: it["refrag"].update(decoder="f" * 40), "were trained with the decoder ffffffffffff, the bundle's"),
        (lambda it: it["refrag"]["policies"]["blind"].update(basis="e" * 40), "policy 'blind' was trained with other"),
        (lambda it: it["refrag"]["policies"]["blind"].update(query=True), "does not see the question, where"),
        (lambda it: it["refrag"]["policies"]["blind"].update(query=1), "query must be of type bool"),
        (lambda it: it["refrag"]["policies"]["blind"].pop("facts"), "policy 'blind': must have .* wrong keys: facts"),
        (lambda it: it["refrag"]["policies"].update(blind=3), "policy 'blind': must be an object"),
        (lambda it: it["refrag"].update(policies=[]), "policies must be an object"),
        (lambda it: it["refrag"].update(training={}), "training must be a list of objects"),
        (lambda it: it["refrag"].update(alignment="words"), "alignment 'words', not one of tokens, text"),
        (lambda it: it["refrag"].update(pooling="max"), "pooling 'max', not one of mean, cls"),
        (lambda it: it["refrag"].update(encoder_width=0), "encoder_width must be a positive integer"),
        (lambda it: it["refrag"].update(encoder_width=8), "width 16, where the manifest's refrag has 8"),
        (lambda it: it["refrag"].update(decoder=1), "decoder must be a fingerprint"),
        (lambda it: it["refrag"].pop("pooling"), "refrag: must have .* wrong keys: pooling"),
        (lambda it: it.update(refrag=[]), "refrag must be of type dict"),
        (lambda it: it.update(chunk_tokens=0), "chunk_tokens must be positive"),
        (lambda it: it.update(chunk_tokens=9), "8 positions, where a chunk has 9 tokens"),
        (lambda it: it["files"].pop("projector.safetensors"), "files lacks projector.safetensors"),
        (lambda it: it["files"].pop("policy-query.safetensors"), "files lacks policy-query.safetensors"),
        (lambda it: it["files"].pop("chunk_encoder/config.json"), "files lacks chunk_encoder/config.json"),
        (lambda it: it["refrag"].update(alignment="text"), "files lacks chunk_encoder/tokenizer.json"),
    ],
)
def test_refuses_a_wrong_record(bundle_dir: Path, change: Callable[[dict[str, Any]], Any], problem: str) -> None:
    change_manifest(bundle_dir, change)
    with pytest.raises(BundleError, match=problem):
        load_bundle(bundle_dir)


@pytest.mark.parametrize("verify_files", [True, False])
def test_refuses_parts_beside_another_decoder(bundle_dir: Path, tmp_path: Path, verify_files: bool) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=5)
    shutil.copy(other / "decoder/model.safetensors", bundle_dir / "decoder/model.safetensors")
    sign_again(bundle_dir)
    with pytest.raises(BundleError, match="projector and the chunk encoder were trained with the decoder"):
        load_bundle(bundle_dir, verify_files=verify_files)


@pytest.mark.parametrize("name", ["projector.safetensors", "chunk_encoder/model.safetensors"])
def test_names_a_missing_and_a_damaged_file(bundle_dir: Path, name: str) -> None:
    tensors = load_file(bundle_dir / name)
    key = sorted(tensors)[0]
    save_file({**tensors, key: tensors[key] * torch.nan}, bundle_dir / name, metadata={"format": "pt"})
    sign_again(bundle_dir)
    with pytest.raises(BundleError, match=f"NaN or infinity in {key}"):
        load_bundle(bundle_dir)
    (bundle_dir / name).unlink()
    with pytest.raises(BundleError, match=r"safetensors: missing"):
        load_bundle(bundle_dir, verify_files=False)


def test_heads_are_not_reweighted_under_trained_parts(pristine: Path, tmp_path: Path) -> None:
    bundle: Bundle = load_bundle(pristine)
    for out in (tmp_path / "out", None):
        with pytest.raises(BundleError, match="apply PEAR first"):
            write_pear(bundle, PEAR, out)
    assert load_bundle(pristine).pear is None


def test_sections_of_a_model_card() -> None:
    card = "# A\n\nText.\n\n## One\n\nold\n\n## Two\n\nkept\n"
    assert with_section(card, "## One", ["new"]) == "# A\n\nText.\n\n## One\n\nnew\n\n## Two\n\nkept\n"
    assert with_section(card, "## Three", ["x", "y"]) == card + "\n## Three\n\nx\ny\n"
    assert with_section("", "## One", ["new"]) == "## One\n\nnew\n"


def test_an_encoder_kept_in_half_the_bytes_computes_in_float32(tmp_path: Path) -> None:
    mine = encoder()
    copy.deepcopy(mine.encoder).to(torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    loaded = ChunkEncoder.from_pretrained(tmp_path, "tokens", "mean")
    assert loaded.encoder.dtype == torch.float32
    chunks = [[5, 6, 7, 8], [9]]
    torch.testing.assert_close(loaded(chunks), mine(chunks), atol=3e-2, rtol=3e-2)
