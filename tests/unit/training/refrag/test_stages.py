"""Every stage at a small size: losses fall, a stopped run ends as if it had not been, bundles go on."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from blockrag.errors import BundleError, SetupError
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.bundle_writing import write_pear
from blockrag.modeling.pear_record import HeadCoefficient, PearRecord, ProxyScore
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.training.refrag.stage_config import RefragConfig
from blockrag.training.refrag.stages import adapt_refrag
from blockrag.training.run import StepMetrics
from tests.models import TINY_VOCAB, make_tiny_bundle, make_tiny_tokenizer

Make = Callable[..., RefragConfig]


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    """All weights of a bundle, by file and name."""
    found = {}
    for path in sorted(bundle.rglob("*.safetensors")):
        found.update({f"{path.relative_to(bundle)}/{name}": value for name, value in load_file(path).items()})
    return found


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["reconstruction", "pretrain", "mixed", "tune"])
def test_losses_fall(config: Make, stage: str) -> None:
    seen: list[StepMetrics] = []
    wanted = config(stage=stage, steps=25, train_decoder=True, curriculum=False, text_share=0.0)

    adapt_refrag(wanted, on_progress=seen.append)

    losses = [sum(metrics.losses.values()) for metrics in seen[1:]]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert [metrics.step for metrics in seen] == list(range(26))
    label = {"reconstruction": "4 chunks", "tune": "rows, block"}.get(stage, "text, compressed")
    assert seen[-1].dev[label]["nats"] < seen[0].dev[label]["nats"]
    assert seen[-1].tokens_per_second > 0 and seen[1].eta_seconds > 0


def test_reconstruction_leaves_the_decoder_alone(config: Make, bundle: Path) -> None:
    made = load_bundle(adapt_refrag(config(stage="reconstruction")))

    before = load_bundle(bundle)
    assert made.fingerprint == before.fingerprint
    assert made.chunk_tokens == 4 and made.refrag is not None
    assert [stage["stage"] for stage in made.refrag.training] == ["reconstruction"]
    assert ChunkCompressor.load(made).embed([[1, 2, 3, 4, 5]])[0].shape == (2, 32)


@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_the_decoders_own_layers_as_the_chunk_encoder(config: Make, tmp_path: Path, pooling: str) -> None:
    wanted = config(stage="reconstruction", encoder="decoder:1", pooling=pooling, out=tmp_path / "first", steps=20)
    seen: list[StepMetrics] = []
    first = load_bundle(adapt_refrag(wanted, on_progress=seen.append))

    assert seen[-1].dev["4 chunks"]["nats"] < seen[0].dev["4 chunks"]["nats"]
    assert first.refrag is not None and (first.refrag.alignment, first.refrag.encoder_layers) == ("decoder", 1)
    assert not first.chunk_encoder_dir.exists()
    width = 32 * (4 if pooling == "concat" else 1)
    assert ChunkCompressor.load(first).embed([[1, 2, 3, 4, 5]])[0].shape == (2, width)
    later = config(stage="pretrain", bundle=first.path, chunk_tokens=None, train_decoder=False)
    second = load_bundle(adapt_refrag(later))
    assert second.refrag is not None and second.refrag.encoder_layers == 1

    with pytest.raises(SetupError, match="own first layers, which must stay as they are"):
        adapt_refrag(replace(later, train_decoder=True, out=tmp_path / "other"))
    with pytest.raises(BundleError, match="the first 9 layers of a decoder that has"):
        adapt_refrag(replace(wanted, encoder="decoder:9", out=tmp_path / "third"))


def test_a_stage_goes_on_from_the_one_before(config: Make, tmp_path: Path) -> None:
    first = adapt_refrag(config(stage="reconstruction", out=tmp_path / "first"))
    second = adapt_refrag(config(stage="tune", bundle=first, out=tmp_path / "second", chunk_tokens=None))

    made = load_bundle(second)
    assert made.refrag is not None
    assert [stage["stage"] for stage in made.refrag.training] == ["reconstruction", "tune"]
    assert made.decoder_fingerprint != load_bundle(first).decoder_fingerprint
    assert "rows, compressed" in made.refrag.training[1]["after"]


def test_a_learnt_decoder_is_averaged_with_another(config: Make, tmp_path: Path, bundle: Path) -> None:
    learnt = adapt_refrag(config(out=tmp_path / "learnt"))
    mixed = adapt_refrag(config(out=tmp_path / "mixed", average_with=bundle, learnt_share=0.25))

    base, new, made = weights(bundle), weights(learnt), weights(mixed)
    for name, value in made.items():
        expected = 0.25 * new[name] + 0.75 * base[name] if name.startswith("decoder/") else new[name]
        assert torch.allclose(value, expected, atol=1e-6), name
    record = load_bundle(mixed).refrag
    assert record is not None
    stage = record.training[-1]
    assert stage["average_with"] == load_bundle(bundle).fingerprint
    assert stage["averaged"]["text, block"] != stage["after"]["text, block"]

    other = make_tiny_bundle(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(SetupError, match="other layers or sizes"):
        adapt_refrag(config(out=tmp_path / "none", average_with=other))


class _StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_stopped_run_ends_as_if_it_had_not_been(config: Make, tmp_path: Path, optimizer: str) -> None:
    wanted = config(stage="mixed", steps=5, checkpoint_steps=2, optimizer=optimizer, precision="bf16")
    whole = adapt_refrag(replace(wanted, out=tmp_path / "whole"))

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise _StopError

    with pytest.raises(_StopError):
        adapt_refrag(wanted, on_progress=stop)
    seen: list[StepMetrics] = []
    resumed = adapt_refrag(wanted, on_progress=seen.append)

    assert [metrics.step for metrics in seen] == [3, 4, 5]
    assert same(whole, resumed)
    records = [json.loads(line) for line in (wanted.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]


_KILLED = """
import os, pickle, signal, sys
from blockrag.training.refrag.stages import adapt_refrag
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
def kill(metrics):
    if metrics.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
adapt_refrag(config, on_progress=kill)
"""


def test_a_killed_process_goes_on(config: Make, tmp_path: Path) -> None:
    wanted = config(stage="reconstruction", steps=4, checkpoint_steps=2, dev_samples=0)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(wanted))
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "config.pickle")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=100,
    )
    assert killed.returncode == -signal.SIGKILL
    seen: list[StepMetrics] = []
    resumed = adapt_refrag(wanted, on_progress=seen.append)

    assert [metrics.step for metrics in seen] == [3, 4]
    assert same(resumed, adapt_refrag(replace(wanted, out=tmp_path / "whole")))


def test_parts_change_nothing_but_rounding(config: Make, tmp_path: Path) -> None:
    for parts in (1, 3):
        adapt_refrag(config(stage="tune", optimizer="adamw", parts=parts, steps=2, out=tmp_path / f"p{parts}"))
    one, three = (
        [json.loads(line) for line in (tmp_path / f"p{parts}.run" / "metrics.jsonl").read_text().splitlines()]
        for parts in (1, 3)
    )
    for a, b in zip(one, three, strict=True):
        assert a.get("losses", {}) == pytest.approx(b.get("losses", {}), rel=1e-3)


def test_a_hugging_face_encoder_reads_the_chunks_text(config: Make, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=TINY_VOCAB, max_position_embeddings=64, **sizes)).save_pretrained(encoder)
    make_tiny_tokenizer().save_pretrained(encoder)
    made = load_bundle(adapt_refrag(config(encoder=str(encoder), pooling="cls")))
    assert made.refrag is not None
    assert (made.refrag.alignment, made.refrag.pooling) == ("text", "cls")
    assert (made.chunk_encoder_dir / "tokenizer.json").is_file()


def test_coefficients_of_heads_become_part_of_a_decoder_that_learns(tmp_path: Path, config: Make) -> None:
    scores = {"block": ProxyScore(3.0, 0.1), "full": ProxyScore(3.0, 0.1)}
    record = PearRecord(
        heads=(HeadCoefficient(layer=1, head=0, tau=0.5, delta_pi=0.1),),
        mask="block",
        mean="batch",
        later_heads="frozen",
        sizes=((4, 6),),
        distractors=2,
        n=6,
        steps=3,
        batch=2,
        learning_rate=5e-3,
        seed=7,
        before=scores,
        after=scores,
    )
    folded = write_pear(load_bundle(config().bundle), record, tmp_path / "pear").path
    kept = load_bundle(adapt_refrag(config(stage="reconstruction", bundle=folded, out=tmp_path / "kept")))
    learnt = load_bundle(adapt_refrag(config(bundle=kept.path, out=tmp_path / "learnt")))
    assert kept.pear is not None and learnt.pear is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"steps": None}, "exactly one of minutes and steps"),
        ({"minutes": 1.0}, "exactly one of minutes and steps"),
        ({"text": ()}, "stage pretrain: needs texts"),
        ({"stage": "tune", "data": ()}, "stage tune: needs questions"),
        ({"stage": "policy"}, "stage 'policy'"),
        ({"chunk_tokens": 0}, "chunk_tokens 0: must be at least 1"),
        ({"stage": "reconstruction", "average_with": Path("x")}, "does not change the decoder"),
        ({"full_share": 1.5}, "full_share 1.5: must be from 0 to 1"),
        ({"learning_rate": 0.0}, "learning_rate 0.0: must be positive"),
    ],
)
def test_contradictions_are_named(config: Make, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(SetupError, match=problem):
        config(**changes)


def test_what_is_wrong_on_disk_is_named(config: Make, tmp_path: Path) -> None:
    for changes, problem in (
        ({"text": (tmp_path / "absent.jsonl",)}, "absent"),
        ({"chunk_tokens": 65}, "longer than a passage"),
        ({"encoder": str(tmp_path / "nowhere")}, "neither 'small' nor 'decoder:N' nor a directory"),
        ({"out": tmp_path}, "exists already"),
    ):
        with pytest.raises(SetupError, match=problem):
            adapt_refrag(config(**changes))


def test_a_chunk_encoder_is_kept_as_it_was_trained(config: Make, tmp_path: Path) -> None:
    first = adapt_refrag(config(stage="reconstruction", out=tmp_path / "first"))
    for changes, problem in (
        ({"chunk_tokens": 8}, "chunk_tokens 8"),
        ({"pooling": "cls"}, "pooling 'cls'"),
        ({"encoder": "small"}, "encoder 'small'"),
    ):
        with pytest.raises(SetupError, match=f"{problem}: .* has a chunk encoder already"):
            adapt_refrag(config(bundle=first, **{"chunk_tokens": None, **changes}))


def test_another_recipe_does_not_go_on_in_the_same_folder(config: Make) -> None:
    def stop(metrics: StepMetrics) -> None:
        raise _StopError

    with pytest.raises(_StopError):
        adapt_refrag(config(), on_progress=stop)
    with pytest.raises(SetupError, match="holds another run: recipe"):
        adapt_refrag(config(seed=5))
