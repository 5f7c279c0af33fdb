import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.modeling.bundle import load_bundle
from tests.models import make_tiny_bundle, make_tiny_refrag_bundle


@pytest.fixture(scope="module")
def compressing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_refrag_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def test_show_prints_what_a_bundle_compresses_with(compressing: Path) -> None:
    bundle = load_bundle(compressing)
    shown = json.loads(CliRunner().invoke(app, ["bundle", "show", str(compressing), "--json"]).output)
    assert bundle.refrag is not None
    assert shown["chunk_tokens"] == 4
    assert shown["pear"] is None
    assert shown["refrag"] == {
        "fingerprint": bundle.compression_fingerprint,
        "policy_basis": bundle.policy_basis,
        **bundle.refrag.to_dict(),
    }
    table = CliRunner().invoke(app, ["bundle", "show", str(compressing)], env={"COLUMNS": "200"}).output
    assert '"alignment": "tokens"' in table
    assert "policy-blind.safetensors" in table


def test_show_says_that_a_bundle_does_not_compress(tmp_path: Path) -> None:
    path = make_tiny_bundle(tmp_path / "plain")
    assert json.loads(CliRunner().invoke(app, ["bundle", "show", str(path), "--json"]).output)["refrag"] is None


def test_verify_checks_mixtures(compressing: Path) -> None:
    result = CliRunner().invoke(app, ["bundle", "verify", str(compressing), "--no-store", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["passed"]
    assert [(report["compute_dtype"], report["kv_dtype"]) for report in found["reports"]] == [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "int8"),
    ]
    assert {report["weights"] for report in found["reports"]} == {"none"}  # heads of 8 are not for the kernel
    for report in found["reports"]:
        names = {check["name"] for check in report["checks"] if check["passed"]}
        assert {"mixture, text", "nothing compressed is block mode, random tokens"} <= names


def test_show_names_a_projector_of_another_decoder(compressing: Path, tmp_path: Path) -> None:
    manifest = json.loads((compressing / "manifest.json").read_text())
    manifest["refrag"]["decoder"] = "f" * 40
    for path in compressing.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(compressing)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(app, ["bundle", "show", str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "the projector and the chunk encoder were trained with the decoder ffffffffffff" in result.output
