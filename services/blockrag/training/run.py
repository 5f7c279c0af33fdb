"""The folder of a run: who writes there, what it computes, how far it has come, and what it reports.

::

    run.json            what decides the result; a run continues only under the same
    metrics.jsonl       one line per step
    checkpoint-<step>/  weights and optimiser, in torch.distributed.checkpoint's form: any number of workers reads it
    tensorboard/        if asked for
"""

from __future__ import annotations

import fcntl
import importlib
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn, optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from blockrag.errors import DataError, SetupError
from blockrag.modeling.files import replace_file
from blockrag.training.workers import Workers

METRICS = "metrics.jsonl"
_RUN = "run.json"
_STATE = "state.json"
_PREFIX = "checkpoint-"
_POLL_SECONDS = 0.2

Optimizers = optim.Optimizer | Sequence[optim.Optimizer]
"""One optimizer, or several that share a model's parameters."""


@dataclass(frozen=True)
class RunState:
    """How far a run has come. The data position is the step: its samples depend on it and the seed alone."""

    step: int = 0
    tokens: int = 0
    """Trained tokens, counted once per mask, without padding."""
    seconds: float = 0.0
    """Time spent in steps."""


class RunFolder:
    """A run's folder. Every worker has one; worker 0 writes, all take part in checkpoints."""

    def __init__(self, path: Path, workers: Workers) -> None:
        self.path = path
        self._workers = workers

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder, for a run that computes what ``identity`` says.

        Raises SetupError when another process holds it, or when it holds another run, naming what differs.
        """
        if self._workers.rank != 0:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process holds no lock
            except OSError as error:
                raise SetupError(f"{self.path}: another process is training there") from error
            self._check(identity)
            yield

    def restore(self, model: nn.Module, optimizer: Optimizers) -> RunState:
        """Load the last checkpoint into ``model`` and ``optimizer``; the state of a new run where there is none.

        Raises DataError naming a checkpoint that cannot be read.
        """
        steps = self._steps()
        if not steps:
            self._cut_metrics(0)
            return RunState()
        folder = self._checkpoint(steps[-1])
        try:
            state = RunState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
            weights, moments = get_state_dict(model, optimizer)
            stored: dict[str, Any] = {"model": weights, "optimizer": moments}
            with _quiet():
                load(stored, checkpoint_id=folder, no_dist=self._workers.size == 1)
        except (OSError, ValueError, TypeError, KeyError, CheckpointException) as error:
            raise DataError(
                f"{folder}: the checkpoint cannot be read: {error}; delete it to go on before it"
            ) from error
        set_state_dict(model, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
        self._cut_metrics(state.step)
        return state

    def save(self, model: nn.Module, optimizer: Optimizers, state: RunState) -> None:
        """Write a checkpoint and drop the one before; a kill at any moment leaves one of them whole."""
        folder = self._checkpoint(state.step)
        staged = folder.with_name(f".{folder.name}")
        if self._workers.rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
        self._workers.barrier()
        weights, moments = get_state_dict(model, optimizer)
        stored = {"model": weights, "optimizer": moments}
        with _quiet():
            save(stored, checkpoint_id=staged, no_dist=self._workers.size == 1)
        if self._workers.rank == 0:
            (staged / _STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            staged.rename(folder)
            for step in self._steps():
                if step != state.step:
                    shutil.rmtree(self._checkpoint(step))
        self._workers.barrier()

    def scores(self) -> dict[str, dict[str, Any]]:
        """Held-out scores ``before`` the first step and ``after`` the last, as in metrics.jsonl; empty without any."""
        found: list[dict[str, Any]] = [record["dev"] for record in read_records(self.path) if "dev" in record]
        return {"before": found[0], "after": found[-1]} if found else {"before": {}, "after": {}}

    def drop_checkpoints(self) -> None:
        """Delete what only a continuation needs; metrics and run.json stay."""
        if self._workers.rank == 0:
            for step in self._steps():
                shutil.rmtree(self._checkpoint(step))

    def _check(self, identity: Mapping[str, Any]) -> None:
        path = self.path / _RUN
        wanted = json.loads(json.dumps(identity))
        if not path.exists():
            replace_file(path, json.dumps(wanted, indent=2) + "\n")
            return
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise SetupError(f"{path}: cannot be read: {error}") from error
        different = [
            f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
        ]
        if different:
            raise SetupError(
                f"{self.path} holds another run: {'; '.join(different)}. Choose another --out, or delete it"
            )

    def _cut_metrics(self, step: int) -> None:
        """Forget the lines of steps that were done after the checkpoint, and half a line that a kill left."""
        path = self.path / METRICS
        if self._workers.rank == 0 and path.exists():
            kept = [record for record in read_records(self.path) if step and record["step"] <= step]
            replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))

    def _checkpoint(self, step: int) -> Path:
        return self.path / f"{_PREFIX}{step}"

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix(_PREFIX) for path in self.path.glob(f"{_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdigit())


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model on the CPU, put together from the workers' parts; every worker calls it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, up to the first that is not whole."""
    path = folder / METRICS
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:  # half a line: who reads again sees it whole
            break
    return records


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a single process saves alone, which it was told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


Scores = Mapping[str, Mapping[str, float]]
"""Held-out scores by what they were measured on, such as a mask or a composition."""


@dataclass(frozen=True)
class StepMetrics:
    """State of a run after a step; step 0 is before the first."""

    step: int
    fraction: float
    """Part of the budget that is used up, 0 to 1."""
    stage: str = ""
    """Of a run of several stages."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Nats per target token of this step's samples, by kind."""
    further: Mapping[str, float] = field(default_factory=dict)
    """What else a step measured, such as a policy's reward."""
    gradient_norm: float = 0.0
    """Before it is clipped to 1."""
    learning_rate: float = 0.0
    tokens: int = 0
    """Trained tokens since the start; of a policy, compositions read."""
    seconds: float = 0.0
    """Time spent in steps since the start."""
    tokens_per_second: float = 0.0
    """Of the last steps."""
    eta_seconds: float = 0.0
    """Time left at that speed."""
    dev: Scores = field(default_factory=dict)
    """Where they were measured."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows first left out in this step on worker 0: file and line, with the tokens that they need at least."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in ("", {})}


OnProgress = Callable[[StepMetrics], None]


class MetricsLog:
    """Appends records to metrics.jsonl, and to TensorBoard's files."""

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        """Raises SetupError naming the package that TensorBoard lacks."""
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = open_tensorboard(folder / "tensorboard") if tensorboard else None

    def write(self, metrics: StepMetrics) -> None:
        """One line, readable at once."""
        values = metrics.to_dict()
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in _flat(values).items():
                if key not in ("step", "fraction"):
                    self._board.add_scalar(key, value, metrics.step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def open_tensorboard(folder: Path, package: str = "torch.utils.tensorboard") -> Any:
    """A SummaryWriter. Raises SetupError where the package is absent."""
    try:
        return importlib.import_module(package).SummaryWriter(str(folder))
    except ImportError as error:
        raise SetupError(f"TensorBoard was asked for: install the package tensorboard ({error})") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by the path to them: "losses/block", "dev/full/nats"."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


class MetricsFollower:
    """Follows a run from another process: hands each new line of metrics.jsonl to a callback, in order and once.

    Also when the file is cut and regrows. Lines that stand there already are passed over: they belong to what was done
    before.
    """

    def __init__(self, folder: Path, on_progress: OnProgress) -> None:
        self._folder = folder
        self._on_progress = on_progress
        self._last = max((metrics.step for metrics in self._read()), default=-1)

    def follow(self, finished: threading.Event) -> None:
        """Poll until ``finished``, and once more after it."""
        while not finished.wait(_POLL_SECONDS):
            self.poll()
        self.poll()

    def poll(self) -> None:
        """Hand on what came since the last time."""
        for metrics in self._read():
            if metrics.step > self._last:
                self._last = metrics.step
                self._on_progress(metrics)

    def _read(self) -> list[StepMetrics]:
        return [StepMetrics(**values) for values in read_records(self._folder)]
