import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from blockrag.training.config import STRETCHED_ROPE, ModelShape, ReaderTrainingConfig
from blockrag.training.export import file_sha256
from blockrag.training.optimizer import learning_rate_factor
from blockrag.training.reader import TrainingProgress, train_reader

TINY = ModelShape(vocab_size=400, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, max_tokens=2048)


def _config(data_dir: Path, out_dir: Path, steps: int) -> ReaderTrainingConfig:
    return ReaderTrainingConfig(
        data_dir=data_dir,
        out_dir=out_dir,
        steps=steps,
        shape=TINY,
        tokens_per_step=600,
        warmup_steps=4,
        checkpoint_steps=3,
        probe_contexts=4,
        tokenizer_articles=100,
    )


def test_loss_falls_and_the_bundle_is_whole(data_dir: Path, tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    config = replace(_config(data_dir, tmp_path, 60), checkpoint_steps=30, optimizer="muon", passage_share=0.5)
    bundle = train_reader(config, seen.append)
    assert [progress.step for progress in seen] == list(range(1, 61))
    losses = [progress.answer_loss for progress in seen]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert seen[-1].fraction == 1.0
    assert set(seen[-1].probe_exact or {}) == {"articles", "people"}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["training"]["steps"] == 60
    assert {name: file_sha256(bundle / name) for name in manifest["files"]} == manifest["files"]
    model = LlamaForCausalLM.from_pretrained(bundle / "decoder")
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(bundle / "decoder")) == TINY.vocab_size


def test_a_run_starts_from_a_bundle(data_dir: Path, tmp_path: Path) -> None:
    first = train_reader(_config(data_dir, tmp_path / "first", 3))
    frozen = replace(_config(data_dir, tmp_path / "second", 1), start_from=first, learning_rate=0.0)
    second = train_reader(frozen)
    expected, found = (load_file(bundle / "decoder/model.safetensors") for bundle in (first, second))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    assert (second / "decoder/tokenizer.json").read_text() == (first / "decoder/tokenizer.json").read_text()


def test_a_bundle_can_be_given_stretched_rotations(data_dir: Path, tmp_path: Path) -> None:
    first = train_reader(_config(data_dir, tmp_path / "first", 1))
    path = first / "decoder/config.json"
    old = json.loads(path.read_text()) | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    path.write_text(json.dumps(old))
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["files"]["decoder/config.json"] = file_sha256(path)
    (first / "manifest.json").write_text(json.dumps(manifest))
    kept = train_reader(replace(_config(data_dir, tmp_path / "kept", 1), start_from=first))
    stretched = train_reader(replace(_config(data_dir, tmp_path / "second", 1), start_from=first, stretch_rope=True))
    assert json.loads((kept / "decoder/config.json").read_text())["rope_parameters"] == old["rope_parameters"]
    assert json.loads((stretched / "decoder/config.json").read_text())["rope_parameters"] == STRETCHED_ROPE


def test_only_long_wavelengths_are_stretched() -> None:
    frequencies = LlamaRotaryEmbedding(ModelShape().config()).inv_freq
    usual = 10000.0 ** -(torch.arange(16) / 16)
    wavelengths = 2 * torch.pi / usual
    torch.testing.assert_close(frequencies[wavelengths < 128], usual[wavelengths < 128])
    torch.testing.assert_close(frequencies[wavelengths > 512], usual[wavelengths > 512] / 64)
    assert int((frequencies * 1300 < 1).sum()) >= 8, "half of a head's pairs hardly turn over ten passages"
    assert int((usual * 1300 < 1).sum()) == 3


def test_full_masks_alone_give_another_model(data_dir: Path, tmp_path: Path) -> None:
    both = train_reader(_config(data_dir, tmp_path / "both", 2))
    full = train_reader(replace(_config(data_dir, tmp_path / "full", 2), masks="full"))
    weights = [load_file(bundle / "decoder/model.safetensors") for bundle in (both, full)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_killed_run_goes_on_as_if_nothing_had_happened(data_dir: Path, tmp_path: Path) -> None:
    whole = train_reader(_config(data_dir, tmp_path / "whole", 12))
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_reader import _config, train_reader\n"
        "def slowly(progress):\n"
        "    print(progress.step, flush=True)\n"
        "    time.sleep(60 if progress.step == 8 else 0)\n"
        f"train_reader(_config(Path({str(data_dir)!r}), Path({str(tmp_path / 'killed')!r}), 12), slowly)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "8":  # two steps after the last checkpoint
                child.send_signal(signal.SIGKILL)
    resumed: list[int] = []
    killed = train_reader(_config(data_dir, tmp_path / "killed", 12), lambda progress: resumed.append(progress.step))
    assert resumed == [7, 8, 9, 10, 11, 12]
    expected, found = (load_file(bundle / "decoder/model.safetensors") for bundle in (whole, killed))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_a_time_budget_ends_the_run(data_dir: Path, tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    started = time.perf_counter()
    train_reader(replace(_config(data_dir, tmp_path, 1), steps=None, minutes=0.02), seen.append)
    assert time.perf_counter() - started < 60
    assert seen[-1].seconds >= 1.2
    assert seen[-1].learning_rate <= seen[len(seen) // 2].learning_rate


@pytest.mark.parametrize("budget", [{"minutes": 1.0}, {"steps": None}])
def test_a_contradictory_budget_is_refused(data_dir: Path, tmp_path: Path, budget: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        train_reader(replace(_config(data_dir, tmp_path, 1), **budget))


def test_the_learning_rate_warms_up_and_falls() -> None:
    assert learning_rate_factor(0, 0.0, 10) == pytest.approx(0.1)
    assert learning_rate_factor(9, 0.0, 10) == pytest.approx(1.0)
    assert learning_rate_factor(500, 1.0, 10) == pytest.approx(0.03)
