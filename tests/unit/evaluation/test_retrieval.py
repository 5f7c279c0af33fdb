"""``blockrag eval retrieval`` from the command line: the real index and the packaged embedding model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.modeling.bundle import load_bundle
from tests.models import make_tiny_bundle
from tests.unit.evaluation.question_files import write_jsonl, write_rows

FACTS = {
    "Fiji": ("Suva is where the government of Fiji sits.", "Where does Fiji's government sit?", "Suva"),
    "Bread": ("A loaf is baked for forty minutes.", "How long is a loaf baked?", "forty minutes"),
    "Chess": ("The bishop moves along diagonals.", "How does the bishop move?", "along diagonals"),
    "Rain": ("Clouds bring showers in the afternoon.", "When do clouds bring showers?", "in the afternoon"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("retrieval") / "bundle")


def test_dense_bm25_and_fused(bundle: Path, tmp_path: Path) -> None:
    rows = [
        {"question": question, "answers": [answer], "passages": [{"title": title, "text": text, "gold": True}]}
        for title, (text, question, answer) in FACTS.items()
    ]
    # Only stop words: BM25 has nothing to search with.
    rows.append({**rows[0], "question": "What is it, and where was it?"})
    data, out = write_jsonl(tmp_path / "facts.jsonl", rows), tmp_path / "out"
    arguments = ["--data", str(data), "--bundle", str(bundle), "--at", "2,1", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, ["eval", "retrieval", *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((out / "retrieval.json").read_text()) == {"format": 1, **report}
    assert (report["questions"], report["passages"], report["pieces"]) == (5, 4, 4)
    assert report["bundle_fingerprint"] == load_bundle(bundle).fingerprint
    scores = {one["search"]: one["metrics"] for one in report["scores"]}
    assert scores.keys() == {"dense", "bm25", "fused"}
    assert list(scores["dense"]) == ["recall@1", "recall@2", "mrr", "ndcg@1", "ndcg@2"]
    assert {name: value["mean"] for name, value in scores["bm25"].items()} == dict.fromkeys(scores["bm25"], 0.8)
    assert scores["dense"]["recall@1"]["mean"] >= 0.8
    assert [(one["first"], one["second"]) for one in report["differences"]] == [("fused", "dense"), ("fused", "bm25")]
    gain = report["differences"][1]["metrics"]["recall@2"]
    assert gain["mean"] == pytest.approx(scores["fused"]["recall@2"]["mean"] - 0.8)
    assert "| recall@1 |" in (out / "retrieval.md").read_text()


def test_mistakes_are_one_line(bundle: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    for arguments, problem in (
        (["--data", str(data), "--at", "500"], "500 results are asked for"),
        (["--data", str(data), "--at", ""], "--at: name at least one"),
        (["--data", str(tmp_path / "absent.jsonl")], "absent.jsonl: No such file"),
    ):
        result = CliRunner().invoke(
            app, ["eval", "retrieval", "--bundle", str(bundle), *arguments], env={"COLUMNS": "400"}
        )
        assert result.exit_code == 1
        assert problem in " ".join(result.output.split())
