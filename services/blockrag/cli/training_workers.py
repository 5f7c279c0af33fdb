"""What the commands that train have in common: this process or workers of Ray Train, progress, the last words."""

from __future__ import annotations

import importlib.util
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from blockrag.cli import console
from blockrag.errors import SetupError
from blockrag.training.configuring import RunConfig

if TYPE_CHECKING:
    from blockrag.training.run import OnProgress, StepMetrics
    from blockrag.training.workers import Workers

WorkersOption = Annotated[int, typer.Option(help="Workers of Ray Train, one GPU or CPU each; 1: this process.")]
RayOption = Annotated[str, typer.Option(help="Ray cluster for the workers; default: one of this command's own.")]


C = TypeVar("C", bound=RunConfig)


class Train(Protocol[C]):  # type: ignore[misc]
    """Trains what a configuration says, as one worker of several or alone."""

    def __call__(self, config: C, workers: Workers | None = None, on_progress: OnProgress | None = None) -> Path: ...


def run_training(
    config: C, prepare: Callable[[C, int], Any], train: Train[C], workers: int, ray_address: str, as_json: bool
) -> None:
    """Train in this process, or on ``workers`` of Ray Train; show the progress, then what was made.

    ``prepare`` says what is wrong before Ray starts.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours shows what matters
    if workers < 1:
        raise SetupError(f"workers {workers}: must be at least 1")
    with shown(as_json) as show:
        if workers == 1 and not ray_address:
            bundle = train(config, on_progress=show)
        else:
            prepare(config, workers)
            with training_workers(ray_address, workers, on_gpus=config.device.startswith("cuda")):
                from blockrag.distributed_training.launching import launch

                work = partial(train, config)
                launch(work, run_dir=config.run_dir, device=config.device, workers=workers, on_progress=show)
            bundle = config.out
    if as_json:
        console.print_json_line({"bundle": bundle, "run": config.run_dir})
    else:
        console.out.print(f"bundle: {bundle}\nmetrics: {config.run_dir}\ncheck it: blockrag bundle verify {bundle}")


@contextmanager
def shown(as_json: bool, *, lines: bool = True) -> Iterator[OnProgress]:
    """Shows a run's progress: a bar for each of its stages, with losses, speed and time left; or a JSON line a step.

    Without ``lines`` nothing is shown where JSON is asked for.
    """
    columns = (console.description_column(), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err, disable=as_json) as bar:
        tasks = {"": bar.add_task("loading", total=1.0)}

        def show(metrics: StepMetrics) -> None:
            if as_json:
                if lines:
                    console.print_json_line(metrics.to_dict())
                return
            if metrics.stage not in tasks:
                tasks[metrics.stage] = tasks.pop("") if "" in tasks else bar.add_task(metrics.stage, total=1.0)
            bar.update(tasks[metrics.stage], completed=metrics.fraction, description=_describe(metrics))
            for place, tokens in metrics.left_out.items():
                bar.console.print(f"left out: {place} needs at least {tokens} tokens", markup=False)
            for label, values in metrics.dev.items():
                found = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
                bar.console.print(f"step {metrics.step}, held out, {label}: {found}", markup=False, soft_wrap=True)

        yield show


def _describe(metrics: StepMetrics) -> str:
    parts = [metrics.stage] if metrics.stage else []
    if metrics.step or not metrics.stage:
        parts.append(f"step {metrics.step}")
    parts += [f"{name} {value:.3f}" for name, value in {**metrics.losses, **metrics.further}.items()]
    if metrics.tokens_per_second:
        parts.append(f"{metrics.tokens_per_second:,.0f} tokens/s")
        parts.append(f"{int(metrics.eta_seconds // 60)}:{int(metrics.eta_seconds % 60):02d} left")
    return "  ".join(parts)


@contextmanager
def training_workers(ray_address: str, workers: int, *, on_gpus: bool) -> Iterator[None]:
    """Connect this process to the Ray at ``ray_address``; empty: one of this command's own, stopped at the end.

    Import what imports Ray inside. Raises SetupError when Ray Train's packages are absent.
    """
    missing = [package for package in ("pyarrow", "pandas") if importlib.util.find_spec(package) is None]
    if missing:
        absent = ", ".join(missing)
        raise SetupError(f"several workers need Ray Train: install the package ray[train] ({absent} absent)")
    with tempfile.NamedTemporaryFile("w", prefix="blockrag-token-") as token:
        if not ray_address:
            # Ray reads its authentication mode when it is imported; a token of our own leaves none in the user's home
            token.write(secrets.token_hex(32))
            token.flush()
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token.name)
        from blockrag.distributed_training.launching import connected_ray

        with connected_ray(ray_address, workers, on_gpus=on_gpus):
            yield
