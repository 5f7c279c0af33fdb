"""Commands whose options are the fields of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from blockrag.cli import adapt
from blockrag.cli.options import command_of
from blockrag.errors import SetupError
from blockrag.training.adaptation.block_config import BlockAdaptConfig


@dataclass(frozen=True)
class Inner:
    draws: int = 8
    """How many."""


@dataclass(frozen=True)
class Config:
    out: Path
    """Where to."""
    stage: str
    data: tuple[Path, ...] = ()
    mask: Literal["block", "full"] = "block"
    """None: ``both``
    of them."""
    share: float | None = None
    keep: bool = True
    loud: bool = False
    inner: Inner = field(default_factory=Inner)
    hidden: int = 3

    def __post_init__(self) -> None:
        if self.share == 2:
            raise SetupError("share 2.0: too much")


def run(*arguments: str) -> tuple[Result, Any]:
    seen: list[Any] = []

    def command(config: Config, twice: bool = False) -> None:
        """What it does."""
        seen.append((config, twice))

    app = typer.Typer()
    app.command()(
        command_of(Config, left_out={"hidden"}, spellings={"data": ("--data", "-d")}, given={"stage": "tune"})(command)
    )
    return CliRunner().invoke(app, list(arguments)), seen[0] if seen else None


def test_defaults_are_those_of_the_fields() -> None:
    assert run("--out", "/made")[1] == (Config(Path("/made"), "tune"), False)


def test_every_field_is_an_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = "--out made -d a -d package:b --mask full --share 0.5 --no-keep --loud --draws 2 --twice"
    config = Config(
        out=tmp_path / "made",
        stage="tune",
        data=(tmp_path / "a", Path("package:b")),
        mask="full",
        share=0.5,
        keep=False,
        loud=True,
        inner=Inner(2),
    )
    assert run(*given.split())[1] == (config, True)


def test_help_is_the_text_under_the_field() -> None:
    text = " ".join(run("--help")[0].output.replace("│", " ").split())
    for words in ("What it does.", "Where to.", "default: both of them.", "How many.", "--keep", "--no-keep"):
        assert words in text
    assert "--hidden" not in text and "--stage" not in text and "--no-loud" not in text


@pytest.mark.parametrize(
    ("given", "code", "problem"),
    [
        ("--out made --share 2", 1, "error: Setup: share 2.0: too much"),
        ("--share 1", 2, "Missing option"),
        ("--out made --hidden 3", 2, "No such option"),
    ],
)
def test_what_is_wrong_is_said(given: str, code: int, problem: str) -> None:
    result, seen = run(*given.split())
    assert (result.exit_code, seen) == (code, None)
    assert problem in " ".join(result.output.split())


def test_files_may_have_shares() -> None:
    def shared(*names: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        config = BlockAdaptConfig(model=Path("m"), out=Path("o"), data=tuple(map(Path, names)), questions=2)
        found = adapt.with_shares(config)
        return tuple(path.name for path in found.data), found.shares

    assert shared("a.jsonl", "b=c.jsonl") == (("a.jsonl", "b=c.jsonl"), ())
    assert shared("a.jsonl=0.3", "b.jsonl") == (("a.jsonl", "b.jsonl"), (0.3, 1.0))


def test_every_option_of_training_has_help() -> None:
    from blockrag.cli.options import _docstrings
    from blockrag.training.pear.pear_config import LearningConfig, PearConfig
    from blockrag.training.refrag.stage_config import PolicyTrainingConfig, PpoSettings, RefragConfig

    nested = {"ppo", "learning", "stage"}
    for config in (BlockAdaptConfig, LearningConfig, PearConfig, PolicyTrainingConfig, PpoSettings, RefragConfig):
        names = {item.name for item in fields(config)} - nested  # type: ignore[arg-type]
        assert names <= _docstrings(config).keys(), config.__name__
