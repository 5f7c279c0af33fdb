"""``blockrag adapt``: make a checkpoint serve cached blocks well, and read compressed passages.

What these commands have in common: this process or workers of Ray Train, progress, the last words.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from blockrag.cli import console
from blockrag.cli.console import JsonOption
from blockrag.cli.options import command_of
from blockrag.distributed_training.own_ray import connected_ray
from blockrag.errors import SetupError
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.configuring import RunConfig
from blockrag.training.refrag.stage_config import STAGES, PolicyTrainingConfig, RefragConfig, Stage

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
            _check_ray_train()
            gpus = workers if config.device.startswith("cuda") else 0
            with connected_ray(ray_address, cpus=workers + 1, gpus=gpus):  # one for Ray Train's controller
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


def _check_ray_train() -> None:
    missing = [package for package in ("pyarrow", "pandas") if importlib.util.find_spec(package) is None]
    if missing:
        absent = ", ".join(missing)
        raise SetupError(f"several workers need Ray Train: install the package ray[train] ({absent} absent)")


app = typer.Typer(no_args_is_help=True, help="Adapt checkpoints and bundles.")


def block(
    config: BlockAdaptConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Fine-tune under the block mask and the full mask, so that cached passages answer as well as a whole prompt.

    Run the same command again to go on after a stop.
    """
    from blockrag.training.adaptation.block import adapt_block, prepare

    run_training(with_shares(config), prepare, adapt_block, workers, ray_address, as_json)


def with_shares(config: BlockAdaptConfig) -> BlockAdaptConfig:
    """FILE or FILE=SHARE each; no shares where none is named, and 1 for files without one where another has one."""
    files: list[Path] = []
    shares: list[float | None] = []
    for path in config.data:
        name, separator, share = path.name.rpartition("=")
        try:
            value = float(share) if separator else None
        except ValueError:
            value = None  # a file whose name holds the sign
        files.append(path if value is None else path.with_name(name))
        shares.append(value)
    named = any(share is not None for share in shares)
    given = tuple(1.0 if share is None else share for share in shares) if named else ()
    return replace(config, data=tuple(files), shares=given)


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


def _stage(
    config: RefragConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    from blockrag.training.refrag.stages import adapt_refrag, prepare

    if config.alignment == "text":
        config = replace(config, encoder=str(Path(config.encoder).expanduser().absolute()))
    run_training(config, prepare, adapt_refrag, workers, ray_address, as_json)


def policy(
    config: PolicyTrainingConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Train what chooses the chunks to expand, with everything else frozen."""
    from blockrag.training.refrag.policy_stage import prepare_policy, train_policy

    run_training(config, prepare_policy, train_policy, workers, ray_address, as_json)


app.command(epilog="Example: blockrag adapt block --model ~/models/Llama-3.2-1B --data qa.jsonl --out my-bundle")(
    command_of(BlockAdaptConfig, left_out={"shares"}, spellings={"template_file": ("--template",)})(block)
)
refrag = typer.Typer(
    no_args_is_help=True,
    help="Train the parts that compress passages and choose what to expand (REFRAG), stage by stage.",
    epilog="Each stage takes the bundle of the one before, in this order; one left out is an ablation. The same "
    "command again goes on after a stop.",
)
for stage, text in _LEARNS.items():
    others = {item.name for item in fields(RefragConfig) if stage not in item.metadata.get("stages", STAGES)}
    data = " --data qa.jsonl" if stage == "tune" else " --text texts.jsonl"
    command = command_of(RefragConfig, left_out=others, spellings=_SPELLINGS, given={"stage": stage})
    refrag.command(
        stage,
        help=text,
        epilog=f"Example: blockrag adapt refrag {stage} --bundle my-bundle{data} --steps 1000 --out my-bundle-2",
    )(command(_stage))
refrag.command(
    "policy", epilog="Example: blockrag adapt refrag policy --bundle tuned --data qa.jsonl --steps 500 --out mine"
)(command_of(PolicyTrainingConfig)(policy))
app.add_typer(refrag, name="refrag")
