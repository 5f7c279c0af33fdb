"""``blockrag adapt``: make a checkpoint serve cached blocks well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from blockrag.cli import adapt_pear, adapt_refrag
from blockrag.cli.console import JsonOption
from blockrag.cli.options import command_of
from blockrag.cli.training_workers import RayOption, WorkersOption, run_training
from blockrag.training.adaptation.config import BlockAdaptConfig

app = typer.Typer(no_args_is_help=True, help="Adapt checkpoints and bundles.")


def block(
    config: BlockAdaptConfig, workers: WorkersOption = 1, ray_address: RayOption = "", as_json: JsonOption = False
) -> None:
    """Fine-tune under the block mask and the full mask, so that cached passages answer as well as a whole prompt.

    Run the same command again to go on after a stop.
    """
    from blockrag.training.adaptation.adapt import adapt_block, prepare

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


app.command(epilog="Example: blockrag adapt block --model ~/models/Llama-3.2-1B --data qa.jsonl --out my-bundle")(
    command_of(BlockAdaptConfig, left_out={"shares"}, spellings={"template_file": ("--template",)})(block)
)
adapt_pear.register(app)
adapt_refrag.register(app)
