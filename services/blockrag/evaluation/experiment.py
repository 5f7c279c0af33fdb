"""What experiments share: where and with what they were measured, and the same questions and passages under every cell,
so that differences are paired."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blockrag import __version__
from blockrag.errors import SetupError
from blockrag.evaluation.drawing import Draw, DrawnQuestion, PieceMaker, draw_questions
from blockrag.evaluation.experiment_options import Distractors, ExperimentOptions
from blockrag.evaluation.question_data import QuestionData, load_questions
from blockrag.evaluation.question_pairs import in_pairs
from blockrag.evaluation.scoring import Interval, bootstrap, bootstrap_difference, contains, exact_match, f1
from blockrag.modeling.bundle import Bundle


@dataclass(frozen=True)
class Environment:
    """Commit, versions and hardware of a measurement."""

    commit: str
    """Git commit of the source tree, with "+" when it had changes; empty outside of a tree."""
    blockrag: str
    """Version of the package."""
    date: str
    """ISO 8601, UTC."""
    cpu: str
    cores: int
    memory_gib: float
    python: str
    torch: str
    transformers: str
    device: str

    @property
    def source(self) -> str:
        """The code that was measured: the commit, outside of a tree the package's version."""
        return f"commit {self.commit}" if self.commit else f"blockrag {self.blockrag}"


def describe_environment(device: str = "cpu") -> Environment:
    """The environment of the calling process."""
    import torch
    import transformers

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return Environment(
        commit=_commit(),
        blockrag=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(pages / 2**30, 1),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=name,
    )


def _commit() -> str:
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed package may lie inside of somebody else's tree, whose commit says nothing about it.
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
        if tracked.returncode:
            return ""
        # --dirty marks changes of tracked files.
        describe = [*git, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        result = subprocess.run(describe, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Report(ABC):
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

    @abstractmethod
    def to_markdown(self) -> str:
        """The report as tables."""

    def files(self, name: str) -> dict[str, bytes]:
        """As JSON and as text, under a name."""
        return {f"{name}.json": self.to_json().encode(), f"{name}.md": self.to_markdown().encode()}

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
            **({"further_gold": [asdict(piece) for piece in question.further]} if question.further else {}),
            **{name: {label: found[number] for label, found in own.items()} for name, own in columns.items()},
        }
        for number, question in enumerate(questions)
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def percent(value: Interval | None, *, sign: bool = False) -> str:
    """A share with its interval in percent: ``55.0 (45.0 to 65.0)``; ``sign`` for differences, a dash for None."""
    if value is None:
        return "–"
    return format(value, "+.1%" if sign else ".1%").replace("%", "")


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


METRICS = ("exact_match", "f1", "contained")
Values = Mapping[str, NDArray[np.float64]]
"""A metric's values, one per question."""
Progress = Callable[[int, int], None]
Status = Callable[[str], None]
Cell = TypeVar("Cell", bound=Hashable)
Found = TypeVar("Found")

_CHUNK = 16
"""Questions asked in all cells before the next: their blocks fit the decoder's own memory."""


@dataclass(frozen=True)
class AnswerScore:
    """Means over the questions."""

    exact_match: Interval
    f1: Interval
    contained: Interval

    def percents(self, *, sign: bool = False) -> list[str]:
        """As cells of a table; ``sign`` for differences."""
        return [percent(value, sign=sign) for value in (self.exact_match, self.f1, self.contained)]


def draw_data(
    options: ExperimentOptions, bundle: Bundle, most: int, absent: int, status: Status, *, pairs: bool = False
) -> tuple[QuestionData, Distractors, Draw]:
    """A run's file, its kind of distractors, and questions with up to ``most`` passages each.

    ``absent`` of them are without the gold one. ``pairs``: two questions asked as one.

    Raises ``SetupError`` for bad data.
    """
    assert options.data is not None
    status("reading the questions")
    data = load_questions(options.data, options.seed)
    if pairs:
        data = in_pairs(data, options.seed)
    kind = options.distractors
    if kind == "auto":
        kind = "same" if any(one.same_kind for one in data.questions) else "bm25"
    status("drawing passages")
    draw = draw_questions(
        data,
        PieceMaker(bundle.template, bundle.load_tokenizer(), bundle.passage_tokens),
        count=options.questions,
        most_passages=most,
        absent_passages=absent,
        distractors=kind,
        seed=options.seed,
    )
    return data, kind, draw


def asked_facts(options: ExperimentOptions, bundle: Bundle, weights: str, started: float) -> dict[str, Any]:
    """Fields of an ``AnswersReport`` that say how answers were made; ``started`` by ``time.perf_counter``.

    ``weights`` are what the model's steps read.
    """
    return {
        "passages": options.passages,
        "max_answer_tokens": options.max_answer_tokens,
        "compute_dtype": bundle.compute_dtype,
        "weights": weights,
        "kv_dtype": bundle.kv_dtype,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "environment": describe_environment(options.device),
    }


def ask_all(
    questions: Sequence[DrawnQuestion],
    cells: Sequence[Cell],
    answer: Callable[[Sequence[int]], Iterable[tuple[Cell, int, Found]]],
    progress: Progress = lambda *_: None,
) -> dict[Cell, list[Found]]:
    """What ``answer`` finds in every cell for each question, in the order of ``questions``.

    ``answer`` gets the numbers of a few questions and gives a result for each of them in each of ``cells``.
    """
    found: dict[Cell, dict[int, Found]] = {cell: {} for cell in cells}
    done = 0
    # Questions about one table show the same articles: neighbours share encoded blocks.
    order = sorted(range(len(questions)), key=lambda number: questions[number].source.same_kind[:1])
    for start in range(0, len(order), _CHUNK):
        for cell, number, result in answer(order[start : start + _CHUNK]):
            found[cell][number] = result
            done += 1
        progress(done, len(cells) * len(questions))
    return {cell: [own[number] for number in range(len(questions))] for cell, own in found.items()}


def answer_values(questions: Sequence[DrawnQuestion], outputs: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The metrics of answers, each [questions]; of a question of several parts, the share that is contained."""
    found = [(output, question.source) for output, question in zip(outputs, questions, strict=True)]
    columns = {
        "exact_match": [float(exact_match(output, source.answers)) for output, source in found],
        "f1": [f1(output, source.answers) for output, source in found],
        "contained": [np.mean([contains(output, part.answers) for part in source.parts]) for output, source in found],
    }
    return {metric: np.array(column) for metric, column in columns.items()}


def means(values: Values, seed: int) -> dict[str, Interval]:
    """The mean of every metric; ``seed`` draws the bootstrap's resamples."""
    return {metric: bootstrap(values[metric], seed) for metric in METRICS}


def differences(first: Values, second: Values, seed: int) -> dict[str, Interval]:
    """The mean of every metric's paired differences, first minus second."""
    return {metric: bootstrap_difference(first[metric], second[metric], seed) for metric in METRICS}
