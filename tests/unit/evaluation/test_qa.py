"""``blockrag eval qa`` from the command line, on a tiny random bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.configured import configured_bundle
from blockrag.evaluation.reader import PlannedPrompt, Reader
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.bundle_writing import write_pear
from blockrag.modeling.pear_record import HeadCoefficient, PearRecord, ProxyScore
from blockrag.settings import BundleSettings, Settings
from tests.models import make_tiny_bundle
from tests.unit.evaluation.question_files import write_jsonl, write_key_values, write_patterns, write_rows

PEAR = PearRecord(
    heads=(HeadCoefficient(0, 1, -3.0, 0.2), HeadCoefficient(1, 0, 4.0, 0.1)),
    mask="block",
    mean="batch",
    later_heads="live",
    sizes=((4, 8),),
    distractors=0,
    n=8,
    steps=1,
    batch=2,
    learning_rate=0.1,
    seed=0,
    before={"block": ProxyScore(2.0, 0.1)},
    after={"block": ProxyScore(1.0, 0.2)},
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("qa") / "bundle")


def _run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["eval", "qa", "--json", "--max-answer-tokens", "4", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def _fingerprint(bundle: Path) -> str:
    """As it is served, and so asked."""
    return configured_bundle(Settings(bundle=BundleSettings(path=str(bundle)))).fingerprint


def _refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["eval", "qa", *map(str, arguments)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_every_mode_and_condition(bundle: Path, tmp_path: Path) -> None:
    data, out = write_patterns(tmp_path / "data"), tmp_path / "out"
    modes = ("full", "block", "no-reencoding", "none")
    asked = ["--passages", 3, "--counts", "1,5", "--places", 3, "--modes", ",".join(modes), "--out", out]
    report = _run("--data", data, "--bundle", bundle, *asked)
    shown = {(score["mode"], score["condition"]) for score in report["results"]["scores"]}
    conditions = ["3 passages", "1 passage", "5 passages", *(f"3 passages, gold at {place}" for place in (1, 2, 3))]
    assert shown == {(mode, condition) for mode in modes[:3] for condition in conditions} | {("none", "no passages")}
    assert report["questions"] == report["answer_in_gold"] == 8
    assert report["systems"] == [
        {
            "label": "tiny",
            "bundle": "tiny",
            "version": "1",
            "fingerprint": _fingerprint(bundle),
            "pear": False,
        }
    ]
    file = data / "dev/wiki_pattern_qa.jsonl.gz"
    assert report["sha256"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert report["results"]["by_group"].keys() == {"founder", "population"}
    assert {one["mode"] for one in report["results"]["refusals"]} == set(modes[:3])
    # Against block mode, under each of its conditions.
    assert len(report["results"]["differences"]) == 2 * len(conditions)

    assert json.loads((out / "qa.json").read_text()) == {"format": 1, **report}
    page = (out / "qa.md").read_text()
    assert _fingerprint(bundle) in page and "| tiny | none | no passages |" in page
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert len(answers[0]["outputs"]) == 3 * (len(conditions) + 1) + 1
    assert (out / "places.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.iterdir())) == 4


def test_scores_are_those_of_the_answers(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "rows.jsonl")

    def answer(self: Reader, planned: Sequence[PlannedPrompt]) -> list[str]:
        # Right where the gold passage is first, a refusal without it, in full mode always right.
        found = []
        for prompt in (one.prompt for one in planned):
            town = prompt.question.split()[-1].rstrip("?")
            right = f"{int(town) * 1037}"
            holds = [right in piece.text for piece in prompt.passages]
            known = prompt.mode == "full" or (bool(holds) and holds[0])
            found.append(f"The {right}." if known else "not in the passages" if not any(holds) else f"{right} or so")
        return found

    monkeypatch.setattr(Reader, "answer", answer)
    report = _run("--data", data, "--bundle", bundle, "--passages", 2, "--places", 2, "--distractors", "random")
    scores = {(one["mode"], one["condition"]): one for one in report["results"]["scores"]}
    first, second = scores["block", "2 passages, gold at 1"], scores["block", "2 passages, gold at 2"]
    assert (first["exact_match"]["mean"], first["contained"]["mean"], first["refused"]["mean"]) == (1.0, 1.0, 0.0)
    assert (second["exact_match"]["mean"], second["contained"]["mean"]) == (0.0, 1.0)
    assert second["f1"]["mean"] == pytest.approx(0.5)
    placed = {one["condition"]: one["exact_match"] for one in report["results"]["differences"]}
    assert placed["2 passages, gold at 2"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert placed["2 passages, gold at 1"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    refusals = {one["mode"]: one for one in report["results"]["refusals"]}
    assert refusals["full"]["precision"] is None and refusals["full"]["recall"]["mean"] == 0.0
    assert refusals["block"]["precision"]["mean"] == refusals["block"]["recall"]["mean"] == 1.0
    assert refusals["block"]["wrong"]["mean"] == 0.0


def test_a_second_bundle_and_folding_switched_off(bundle: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    write_pear(load_bundle(bundle), PEAR, tuned)
    other = make_tiny_bundle(tmp_path / "other", seed=5)
    data = write_rows(tmp_path / "rows.jsonl")
    report = _run(
        *("--data", data, "--bundle", tuned, "--without-pear", "--compare", other, "--modes", "block,full"),
        *("--passages", 2, "--questions", 4, "--no-absent", "--out", tmp_path / "out"),
    )
    labels = [system["label"] for system in report["systems"]]
    fingerprints = [system["fingerprint"] for system in report["systems"]]
    assert labels == ["tiny", "tiny without PEAR", f"tiny {_fingerprint(other)[:8]}"]
    assert [system["pear"] for system in report["systems"]] == [True, False, False]
    # Switched off, the bundle is the one that the coefficients were added to.
    assert fingerprints[1:] == [_fingerprint(bundle), _fingerprint(other)]
    pairs = {(one["first"], one["second"]) for one in report["results"]["differences"]}
    assert ("tiny without PEAR, block", "tiny, block") in pairs
    assert (f"{labels[2]}, full", "tiny, full") in pairs
    assert ("tiny, full", "tiny, block") in pairs
    assert report["results"]["refusals"] == []

    plain = _run(
        *("--data", data, "--bundle", bundle, "--modes", "block,full", "--passages", 2, "--questions", 4),
        *("--no-absent", "--out", tmp_path / "plain"),
    )
    assert plain["systems"][0]["pear"] is False
    outputs, alone = (
        [json.loads(line)["outputs"] for line in (tmp_path / folder / "answers.jsonl").read_text().splitlines()]
        for folder in ("out", "plain")
    )
    for one, same in zip(outputs, alone, strict=True):
        assert one["tiny without PEAR, block, 2 passages"] == same["tiny, block, 2 passages"]
    assert any(one["tiny, full, 2 passages"] != one["tiny without PEAR, full, 2 passages"] for one in outputs)


def test_key_value_look_ups(bundle: Path, tmp_path: Path) -> None:
    report = _run("--data", write_key_values(tmp_path / "kv.jsonl"), "--bundle", bundle, "--passages", 5)
    assert (report["distractors"], report["questions"]) == ("same", 2)


def test_mistakes_are_one_line(bundle: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"question": "?", "answers": [], "passages": [3]}])
    (tmp_path / "broken").mkdir()
    asked = ("--data", data, "--bundle", bundle)
    assert "absent.jsonl: No such file" in _refused("--data", tmp_path / "absent.jsonl", "--bundle", bundle)
    assert "bad.jsonl:1: a passage must have" in _refused("--data", bad, "--bundle", bundle)
    assert "manifest.json: missing" in _refused("--data", data, "--bundle", tmp_path / "broken")
    assert "too few passages to show 90" in _refused(*asked, "--passages", 90)
    assert "no PEAR coefficients" in _refused(*asked, "--without-pear")
    assert "--modes: blok" in _refused(*asked, "--modes", "blok")
    assert "--counts '1;2'" in _refused(*asked, "--counts", "1;2")
    assert "--counts '0'" in _refused(*asked, "--counts", "0")
    assert "30 passages do not fit" in _refused(*asked, "--max-answer-tokens", 1024, "--passages", 30)


def test_an_interrupt_writes_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "answer", interrupt)
    data = write_rows(tmp_path / "rows.jsonl")
    arguments = ["eval", "qa", "--data", str(data), "--bundle", str(bundle), "--passages", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert not (tmp_path / "out").exists()
