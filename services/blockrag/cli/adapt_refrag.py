"""``blockrag adapt refrag``: teach a bundle to read compressed passages, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from blockrag.cli import console
from blockrag.cli.console import JsonOption
from blockrag.cli.options import command_of
from blockrag.cli.training_workers import RayOption, WorkersOption, check_workers, tell_made, training_workers
from blockrag.training.refrag.config import SMALL_ENCODER, STAGES, RefragConfig, Stage
from blockrag.training.refrag.policy_config import PolicyTrainingConfig

if TYPE_CHECKING:
    from blockrag.training.refrag.metrics import RefragMetrics
    from blockrag.training.refrag.policy_metrics import PolicyMetrics


_SPELLINGS = {
    "chunk_tokens": ("--chunk-tokens", "-k"),
    "train_decoder": ("--train-decoder/--freeze-decoder",),
}
_LEARNS: dict[Stage, str] = {
    "reconstruction": "Learn to say again what chunks say, from one chunk to many, with the decoder frozen.",
    "pretrain": "Learn to go on after compressed passages of a text.",
    "mixed": "The same with some of the chunks expanded.",
    "tune": "Learn to answer questions over passages of which some chunks are compressed.",
}


def register(app: typer.Typer) -> None:
    """Add the group to the group ``adapt``."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Train the parts that compress passages and choose what to expand (REFRAG), stage by stage.",
        epilog="Each stage takes the bundle of the one before, in this order; one left out is an ablation. The same "
        "command again goes on after a stop.",
    )
    for stage, text in _LEARNS.items():
        others = {item.name for item in fields(RefragConfig) if stage not in item.metadata.get("stages", STAGES)}
        data = " --data qa.jsonl" if stage == "tune" else " --text texts.jsonl"
        command = command_of(RefragConfig, left_out=others, spellings=_SPELLINGS, given={"stage": stage})
        group.command(
            stage,
            help=text,
            epilog=f"Example: blockrag adapt refrag {stage} --bundle my-bundle{data} --steps 1000 --out my-bundle-2",
        )(command(_stage))
    group.command(
        "policy", epilog="Example: blockrag adapt refrag policy --bundle tuned --data qa.jsonl --steps 500 --out mine"
    )(command_of(PolicyTrainingConfig)(policy))
    app.add_typer(group, name="refrag")


def _stage(
    config: RefragConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    _quiet()
    if config.encoder not in ("", SMALL_ENCODER):
        config = replace(config, encoder=str(Path(config.encoder).expanduser().absolute()))
    with _shown(as_json) as show:
        made = _run(config, workers, ray_address, show)
    tell_made(made, config.run_dir, as_json)


def policy(
    config: PolicyTrainingConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Train what chooses the chunks to expand, with everything else frozen."""
    _quiet()
    with _policy_shown(as_json) as show:
        made = _run_policy(config, workers, ray_address, show)
    tell_made(made, config.run_dir, as_json)


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours shows what matters


def _run(config: RefragConfig, workers: int, ray_address: str, show: Callable[[RefragMetrics], None]) -> Path:
    from blockrag.training.refrag.adapt import adapt_refrag, prepare

    check_workers(workers)
    prepare(config, workers)  # what is wrong is said before Ray starts
    if workers == 1 and not ray_address:
        return adapt_refrag(config, on_progress=show)
    with training_workers(ray_address, workers, on_gpus=config.device.startswith("cuda")):
        from blockrag.distributed_training.refrag import adapt_refrag_distributed

        return adapt_refrag_distributed(config, workers, show)


def _run_policy(
    config: PolicyTrainingConfig, workers: int, ray_address: str, show: Callable[[PolicyMetrics], None]
) -> Path:
    from blockrag.training.refrag.policy_stage import prepare_policy, train_policy

    check_workers(workers)
    prepare_policy(config)
    if workers == 1 and not ray_address:
        return train_policy(config, show)
    with training_workers(ray_address, workers, on_gpus=config.device.startswith("cuda")):
        from blockrag.distributed_training.refrag import train_policy_distributed

        return train_policy_distributed(config, workers, show)


@contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[RefragMetrics], None]]:
    """Shows a stage's progress: a bar with speed and time left, or a JSON line per step."""
    with _bar(as_json) as bar:
        task = bar.add_task("loading", total=1.0)

        def show(metrics: RefragMetrics) -> None:
            if as_json:
                console.print_json_line(metrics)
                return
            losses = [f"{kind} {loss:.3f}" for kind, loss in metrics.losses.items()]
            left = f"{int(metrics.eta_seconds // 60)}:{int(metrics.eta_seconds % 60):02d} left"
            speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
            description = "  ".join([f"step {metrics.step}", *losses, speed, left])
            bar.update(task, completed=metrics.fraction, description=description)
            for label, values in metrics.dev.items():
                found = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
                bar.console.print(f"step {metrics.step}, held out, {label}: {found}", markup=False, soft_wrap=True)

        yield show


@contextmanager
def _policy_shown(as_json: bool) -> Iterator[Callable[[PolicyMetrics], None]]:
    """The same for a policy."""
    with _bar(as_json) as bar:
        task = bar.add_task("loading", total=1.0)

        def show(metrics: PolicyMetrics) -> None:
            if as_json:
                console.print_json_line(metrics.to_dict())
                return
            reward = f"  reward {metrics.update.reward:.3f}" if metrics.update else ""
            bar.update(task, completed=metrics.fraction, description=f"step {metrics.step}{reward}")
            for score in metrics.dev.scores if metrics.dev else ():
                bar.console.print(
                    f"step {metrics.step}, held out, {score.kind} at rate {score.rate:g}: {score.policy:.3f} nats, "
                    f"random {score.random:.3f}, gain {score.gain:.3f} ± {score.error:.3f}",
                    markup=False,
                    soft_wrap=True,
                )

        yield show


def _bar(hidden: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console.err, disable=hidden)
