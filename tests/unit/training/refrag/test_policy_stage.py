"""Training a policy with a frozen reader, from data to bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockrag.errors import BundleError, SetupError
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.modeling.refrag.policy import ChunkPolicy
from blockrag.modeling.refrag.refrag_writing import write_refrag
from blockrag.training.adaptation.batch import Branch
from blockrag.training.refrag.policy_samples import PolicyContext, answer_target
from blockrag.training.refrag.policy_stage import train_policy
from blockrag.training.refrag.stage_config import PolicyTrainingConfig
from blockrag.training.run import StepMetrics
from tests.models import TINY_VOCAB, make_tiny_bundle
from tests.unit.training.adaptation.conftest import write_rows


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(0)
    encoder, projector = ChunkEncoder.for_tokens(TINY_VOCAB, None, width=16, heads=2), Projector(16, 32)
    plain = load_bundle(make_tiny_bundle(folder / "plain"))
    write_refrag(plain, folder / "bundle", encoder=encoder, projector=projector, chunk_tokens=4, training=())
    return folder / "bundle"


def _config(
    bundle: Path, out: Path, *, text: tuple[Path, ...] = (), data: tuple[Path, ...] = ()
) -> PolicyTrainingConfig:
    return PolicyTrainingConfig(
        bundle=bundle,
        out=out,
        text=text,
        data=data,
        steps=4,
        contexts=2,
        max_passages=3,
        dev_samples=2,
        checkpoint_steps=2,
        eval_steps=2,
        threads=1,
        precision="fp32",
    )


class _StopError(Exception):
    pass


@pytest.mark.parametrize("query", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(
    query: bool, bundle: Path, texts: Path, rows: Path, tmp_path: Path
) -> None:
    whole, cut = (
        replace(
            _config(bundle, tmp_path / name, text=(texts,), data=(rows,)),
            policy="query" if query else "blind",
            text_share=0.5,
            imitation=0.5,
            policy_width=32,
            text_reward="label" if query else "divergence",
        )
        for name in ("whole", "cut")
    )
    seen: list[StepMetrics] = []
    train_policy(whole, on_progress=seen.append)
    assert [metrics.step for metrics in seen] == [0, 1, 2, 3, 4]
    assert [bool(metrics.dev) for metrics in seen] == [True, False, True, False, True]
    assert {label.partition(" ")[0] for label in seen[-1].dev} == {"answers", "text"}
    # half of the budget imitates, the rest draws
    assert ["imitation" in metrics.losses for metrics in seen] == [False, True, True, False, False]
    assert ["reward" in metrics.further for metrics in seen] == [False, False, False, True, True]
    assert seen[2].tokens == 0 < seen[4].tokens and seen[4].tokens % 8 == 0

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise _StopError

    with pytest.raises(_StopError):
        train_policy(cut, on_progress=stop)
    resumed: list[int] = []
    train_policy(cut, on_progress=lambda metrics: resumed.append(metrics.step))
    assert resumed == [3, 4]
    name = "query" if query else "blind"
    one, other = (load_file(tmp_path / run / f"policy-{name}.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(float(tensor.abs().max()) > 0 for key, tensor in one.items() if key.startswith("score"))
    # what is written beside: one line per step, and the facts in the manifest
    lines = [json.loads(line) for line in (cut.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    record = load_bundle(tmp_path / "cut").refrag
    assert record is not None
    sizes = ChunkPolicy.load(tmp_path / "cut" / record.policies[name].file).config
    assert (sizes.width, sizes.heads, sizes.hidden) == (32, 1, 64)
    facts = record.policies[name].facts
    assert facts["steps"] == 4 and facts["held_out"]["before"] == lines[0]["dev"]
    assert facts["held_out"]["after"] == lines[-1]["dev"]


def test_a_second_policy_stands_beside_the_first(bundle: Path, texts: Path, tmp_path: Path) -> None:
    numbers = [
        {
            "question": f"What is the number of town {number}?",
            "answers": [str(number * 37)],
            "passages": [
                {"title": f"town {number}", "text": f"Its number is {number * 37}.", "gold": True},
                {"title": "river", "text": "The river is long. It has no number.", "gold": False},
            ],
        }
        for number in range(30)
    ]
    data = write_rows(tmp_path / "numbers.jsonl", numbers)
    first = train_policy(replace(_config(bundle, tmp_path / "one", text=(texts,)), policy="blind", steps=1))
    both = replace(_config(first, tmp_path / "two", data=(data,)), steps=1, name="numbers")
    made = load_bundle(train_policy(both))
    assert made.refrag is not None
    assert {name: policy.query for name, policy in made.refrag.policies.items()} == {"blind": False, "numbers": True}
    for policy in made.refrag.policies.values():
        assert ChunkPolicy.load(made.path / policy.file).config.encoder_width == 16
    assert made.fingerprint == load_bundle(bundle).fingerprint
    # after the parts were tuned, a policy goes on from the one before; one of another kind is refused
    start = made.path / "policy-numbers.safetensors"
    again = replace(both, out=tmp_path / "three", start_from=start, learning_rate=1e-9)
    went_on = load_file(train_policy(again) / "policy-numbers.safetensors")
    assert all(torch.allclose(went_on[key], tensor, atol=1e-6) for key, tensor in load_file(start).items())
    with pytest.raises(SetupError, match="is to be trained"):
        train_policy(replace(again, out=tmp_path / "four", policy="blind"))


def test_what_an_answer_is_imitated_by() -> None:
    """Passage 1 shares more with the question than passage 0, which holds the same number."""
    passages = ((3, 50, 51, 52, 7, 7), (3, 60, 61, 50, 51, 52, 9, 9, 9), (3, 3))
    branch = Branch([5, 60, 61, 6], [50, 51, 2])
    context = PolicyContext((1,), passages, (branch,), ((2, 1, 0),), "answers")
    target = answer_target(context, branch, 2)
    assert target is not None
    # chunks of two tokens: three of passage 0, five of passage 1, one of passage 2
    assert target[:3].tolist() == [0, 0, 0] and target[8] == 0
    # the answer's two tokens stand in the second and third chunk of passage 1
    assert target[4] == target[5] == pytest.approx(0.35) and target[3] == target[6] > target[7] > 0
    assert float(target.sum()) == pytest.approx(1.0)
    assert answer_target(context, Branch([5], [77, 2]), 2) is None


def test_what_cannot_be_trained_is_refused(bundle: Path, rows: Path, tmp_path: Path) -> None:
    config = _config(bundle, tmp_path / "out", data=(rows,))
    plain = make_tiny_bundle(tmp_path / "plain")
    with pytest.raises(BundleError, match="no chunk compression"):
        train_policy(replace(config, bundle=plain))
    with pytest.raises(SetupError, match="exists already"):
        train_policy(replace(config, out=plain))
    with pytest.raises(SetupError, match="absent"):
        train_policy(replace(config, data=(tmp_path / "absent.jsonl",)))
    with pytest.raises(SetupError, match="exactly one"):
        replace(config, minutes=1.0)
    for change in (
        {"contexts": 0},
        {"learning_rate": 0.0},
        {"text_share": 1.5},
        {"imitation": 1.0},
        {"policy_width": 48},
        {"text_reward": "other"},
    ):
        with pytest.raises(SetupError, match=next(iter(change))):
            replace(config, **change)
    with pytest.raises(SetupError, match="needs questions"):
        replace(config, data=())
    train_policy(replace(config, steps=1, contexts=1, dev_samples=1))
    (tmp_path / "out.run").rename(tmp_path / "other.run")
    with pytest.raises(SetupError, match="holds another run"):
        train_policy(replace(config, out=tmp_path / "other", seed=1))
