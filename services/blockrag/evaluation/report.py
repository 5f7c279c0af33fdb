"""Reports of measurements: tables in Markdown, one JSON object, every answer; files that appear whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockrag.errors import SetupError
from blockrag.evaluation.drawing import DrawnQuestion
from blockrag.evaluation.environment import Environment
from blockrag.evaluation.intervals import Interval

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every report says, and what is needed to repeat its run."""

    data: str
    """Empty where no questions were asked."""
    sha256: Mapping[str, str]
    """Of every data file that was read."""
    seed: int
    seconds: float
    environment: Environment

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, indent=2) + "\n"

    def facts(self, *lines: str) -> list[str]:
        """A list of where and with what it was measured, ``lines``, and the files."""
        place = self.environment
        machine = f"{place.source}, {place.date}, {place.cpu}, {place.device}, {self.seconds:.0f} s"
        files = [f"{name}: SHA-256 `{digest}`" for name, digest in self.sha256.items()]
        return [*(f"- {line}" for line in (machine, *lines, *files)), ""]


@dataclass(frozen=True, kw_only=True)
class AnswersReport(Report):
    """What reports of answers say."""

    passages: int
    distractors: str
    max_answer_tokens: int
    compute_dtype: str
    """Of weights and activations."""
    kv_dtype: str
    """Of cached K and V."""
    weights: str
    """What decode steps read, "int8" or "none"."""

    @property
    def asked(self) -> str:
        """How answers were made."""
        return (
            f"greedy, at most {self.max_answer_tokens} tokens, computed in {self.compute_dtype} with K and V in "
            f"{self.kv_dtype}, decode steps with {'int8' if self.weights == 'int8' else 'whole'} weights, "
            f"seed {self.seed}"
        )


def answer_lines(questions: Sequence[DrawnQuestion], columns: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """One JSON line per question; ``columns`` holds, by name and label, a value for each question."""
    lines: Iterable[dict[str, Any]] = (
        {
            "id": question.source.id,
            "question": question.source.text,
            "answers": question.source.answers,
            "gold": asdict(question.gold),
            **{name: {label: found[number] for label, found in own.items()} for name, own in columns.items()},
        }
        for number, question in enumerate(questions)
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def percent(value: Interval, *, sign: bool = False) -> str:
    """A share with its interval in percent: ``55.0 (45.0 to 65.0)``; ``sign`` for differences."""
    form = "{:+.1f}" if sign else "{:.1f}"
    mean, low, high = (form.format(100 * number) for number in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table under a heading; none without rows."""
    return [f"## {title}", "", *table(header, rows)] if rows else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one after it."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def write_together(out: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into the directory ``out``, made where it is missing; older files of these names are replaced.

    Everything is written elsewhere first and then moved, so that an interrupt leaves no half of a file. Raises
    ``SetupError`` where the directory cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            for name in files:
                (Path(folder) / name).replace(out / name)
    except OSError as error:
        raise SetupError(f"{out}: {error.strerror or error}") from error
