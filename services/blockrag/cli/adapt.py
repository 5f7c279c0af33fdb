"""``blockrag adapt``: make a checkpoint serve cached blocks well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from blockrag.cli import adapt_pear, adapt_refrag, console
from blockrag.cli.console import JsonOption
from blockrag.cli.options import command_of
from blockrag.cli.training_workers import RayOption, WorkersOption, check_workers, tell_made, training_workers
from blockrag.training.adaptation.config import BlockAdaptConfig

if TYPE_CHECKING:
    from blockrag.training.adaptation.metrics import StepMetrics

app = typer.Typer(no_args_is_help=True, help="Adapt checkpoints and bundles.")


def block(
    config: BlockAdaptConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Fine-tune under the block mask and the full mask, so that cached passages answer as well as a whole prompt.

    Run the same command again to go on after a stop.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours shows what matters
    config = with_shares(config)
    with _shown(as_json) as show:
        bundle = _run(config, workers, ray_address, show)
    tell_made(bundle, config.run_dir, as_json)


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


def _run(config: BlockAdaptConfig, workers: int, ray_address: str, show: Callable[[StepMetrics], None]) -> Path:
    from blockrag.training.adaptation.adapt import adapt_block

    check_workers(workers)
    if workers == 1 and not ray_address:
        return adapt_block(config, on_progress=show)
    with training_workers(ray_address, workers, on_gpus=config.device.startswith("cuda")):
        from blockrag.distributed_training.block import adapt_block_distributed

        return adapt_block_distributed(config, workers, show)


@contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[StepMetrics], None]]:
    """Shows a run's progress: a bar with speed and time left, or a JSON line per step."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err, disable=as_json) as bar:
        task = bar.add_task("loading", total=None)

        def show(metrics: StepMetrics) -> None:
            if as_json:
                console.print_json_line(metrics)
                return
            bar.update(task, completed=metrics.step, total=metrics.steps, description=_describe(metrics))
            for place, tokens in metrics.too_long.items():
                bar.console.print(f"left out: {place} needs at least {tokens} tokens", markup=False)
            if metrics.dev is not None:
                dev = metrics.dev
                bar.console.print(
                    f"step {metrics.step}, held out: block {dev.block_loss:.3f} nats, {dev.block_exact:.1%} exact; "
                    f"full {dev.full_loss:.3f} nats, {dev.full_exact:.1%} exact"
                )

        yield show


def _describe(metrics: StepMetrics) -> str:
    losses = [
        f"{name} {loss:.3f}"
        for name, loss in (("block", metrics.block_loss), ("full", metrics.full_loss))
        if loss is not None
    ]
    left = f"{int(metrics.eta_seconds // 60)}:{int(metrics.eta_seconds % 60):02d} left"
    speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
    return "  ".join([f"step {metrics.step}/{metrics.steps}", *losses, speed, left])


app.command(epilog="Example: blockrag adapt block --model ~/models/Llama-3.2-1B --data qa.jsonl --out my-bundle")(
    command_of(BlockAdaptConfig, left_out={"shares"}, spellings={"template_file": ("--template",)})(block)
)
adapt_pear.register(app)
adapt_refrag.register(app)
