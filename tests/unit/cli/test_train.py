from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.training.config import ReaderTrainingConfig


def _config(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ReaderTrainingConfig:
    """What the command would train."""
    seen: list[ReaderTrainingConfig] = []

    def train_reader(config: ReaderTrainingConfig, _: object) -> Path:
        seen.append(config)
        return config.out_dir / "bundle"

    monkeypatch.setattr("blockrag.training.reader.train_reader", train_reader)
    command = ["train", "reader", "--data", "data", "--out", "out", "--steps", "3", *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_defaults_are_the_training_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given, own = _config(monkeypatch), ReaderTrainingConfig(Path("data"), Path("out"), steps=3)
    assert {field.name: getattr(given, field.name) for field in fields(own)} == vars(own)


def test_options_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(monkeypatch, "--evidence", "0.7", "--passage-share", "0.25", "--related-words", "words")
    assert (config.evidence, config.passage_share, config.related_words) == (0.7, 0.25, Path("words"))


@pytest.mark.parametrize("wrong", [("--passage-share", "0"), ("--passage-share", "1.5"), ("--evidence", "-1")])
def test_shares_and_weights_out_of_range_are_refused(wrong: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["train", "reader", "--data", "data", "--out", "out", "--steps", "3", *wrong])
    assert result.exit_code == 2
    assert wrong[0] in result.output
