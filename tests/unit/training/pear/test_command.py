from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from blockrag.cli import adapt_pear
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.bundle_writing import create_bundle
from blockrag.modeling.model import load_stock_model
from blockrag.modeling.pear import attention_heads
from blockrag.modeling.verify import verify_bundle
from tests.models import TEST_TEMPLATE, make_tiny_bundle, make_tiny_checkpoint, make_tiny_model

QUICK = ["--sizes", "6x8,4x5", "--n", "8", "--steps", "4", "--batch", "4", "--distractors", "2"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(adapt_pear.app, ["pear", *map(str, arguments)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "made"
    result = run("--bundle", bundle, "--out", out, "-k", 3, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_makes_a_bundle_that_verifies(bundle: Path, made: tuple[Path, dict[str, Any]]) -> None:
    out, content = made
    loaded = load_bundle(out)

    assert loaded.pear is not None and 1 <= len(loaded.pear.heads) <= 3
    assert loaded.pear.to_dict() == json.loads(json.dumps(loaded.pear.to_dict())) | {
        key: loaded.pear.to_dict()[key] for key in ("heads", "sizes")
    }
    assert (
        content["made_fingerprint"] == loaded.fingerprint != content["fingerprint"] == load_bundle(bundle).fingerprint
    )
    assert verify_bundle(out).passed


def test_says_everything_in_json(made: tuple[Path, dict[str, Any]]) -> None:
    content = made[1]

    for condition in ("full", "block", "full, same prompts"):
        detection = content["detections"][condition]
        values = [value for row in detection["delta_pi"] for value in row]
        assert len(values) == 12 and detection["ranked"][0]["delta_pi"] == max(values)
    assert -1 <= content["rank_correlations"]["full / block"] <= 1
    assert content["pear"]["mask"] == "block" and set(content["pear"]["after"]) == {"full", "block"}
    assert json.loads((made[0].parent / "made-pear" / "pear.json").read_text(encoding="utf-8")) == content


def test_draws_a_heat_map(made: tuple[Path, dict[str, Any]]) -> None:
    picture = (made[0].parent / "made-pear" / "delta_pi.png").read_bytes()

    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_in_place_replaces_earlier_coefficients(bundle: Path, tmp_path: Path) -> None:
    target = create_copy(bundle, tmp_path)
    first = run("--bundle", target, "--in-place", "--report", tmp_path / "report", *QUICK, "--mask", "full")
    once = load_bundle(target)
    second = run("--bundle", target, "--in-place", "--report", tmp_path / "report", *QUICK, "--mask", "full")

    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert once.pear is not None
    assert load_bundle(target).fingerprint == once.fingerprint, "found again from the weights as they are"
    assert "proxy task, held out" in first.stdout


def test_another_recipe_does_not_go_on_in_the_same_folder(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    assert run("--bundle", bundle, "--out", out, *QUICK).exit_code == 0
    kept = sorted(path.name for path in (tmp_path / "made.run").iterdir())
    assert kept == ["detections.json", "lock", "metrics.jsonl", "run.json"]
    shutil.rmtree(out)  # as if it had been stopped before the bundle was written
    other = run("--bundle", bundle, "--out", out, *QUICK, "--seed", 1)
    assert other.exit_code == 1 and "holds another run: recipe" in " ".join(other.stderr.split())
    assert run("--bundle", bundle, "--out", out, *QUICK).exit_code == 0


def test_detecting_only_makes_no_bundle(bundle: Path, tmp_path: Path) -> None:
    result = run("--bundle", bundle, "--detect-only", "--report", tmp_path / "report", *QUICK)

    assert result.exit_code == 0, result.output
    assert "detected only: no bundle was written" in result.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["delta_pi.png", "pear.json", "report"]


def test_no_suppressing_head_no_bundle(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    model = make_tiny_model()
    for output in attention_heads(model).outputs:
        output.weight.data.zero_()
    model.save_pretrained(checkpoint)
    source = create_bundle(checkpoint, tmp_path / "source", TEST_TEMPLATE)
    result = run("--bundle", source.path, "--out", tmp_path / "made", *QUICK)

    assert result.exit_code == 0, result.output
    assert "no head suppresses copying" in result.stdout and "no bundle was written" in result.stdout
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--detect-only", "--in-place"], "exactly one of --out, --in-place and --detect-only"),
        ([], "exactly one of"),
        (["--detect-only", "-k", "13"], "heads: 13, where the model has 12"),
        (["--detect-only", "--sizes", "6x300"], "n: a prompt needs 300 different tokens"),
        (["--detect-only", "--sizes", "6by3"], "must be like 20x50,40x25"),
        (["--detect-only", "--sizes", "0x8"], "at least one prompt each"),
        (["--detect-only", "--n", "1", "--sizes", "6x8"], "n: 1 tokens per copy"),
        (["--detect-only", "--distractors", "0", "--sizes", "6x8"], "the block mask differs"),
    ],
)
def test_refuses(bundle: Path, arguments: list[str], problem: str, tmp_path: Path) -> None:
    result = run("--bundle", bundle, "--report", tmp_path / "report", *arguments)

    assert result.exit_code == 1
    assert problem in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_names_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    result = run("--bundle", tmp_path / "nothing", "--detect-only")

    assert result.exit_code == 1
    assert "no such directory" in " ".join(result.stderr.split())


def test_does_not_overwrite(bundle: Path, tmp_path: Path) -> None:
    result = run("--bundle", bundle, "--out", bundle, *QUICK)

    assert result.exit_code == 1 and "exists already" in " ".join(result.stderr.split())


def create_copy(bundle: Path, folder: Path) -> Path:
    source = load_bundle(bundle)
    copy = create_bundle(source.decoder_dir, folder / "copy", source.template, passage_tokens=source.passage_tokens)
    assert load_stock_model(copy).num_parameters() == load_stock_model(source).num_parameters()
    return copy.path
