"""``blockrag train``: models of the project's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from blockrag.cli import console
from blockrag.cli.console import JsonOption
from blockrag.errors import SetupError

app = typer.Typer(no_args_is_help=True, help="Train models.")


@app.callback()
def _group() -> None:
    """Keeps ``reader`` a command of its own while it is the only one."""


@app.command(epilog="Example: blockrag train reader --data data/ --out runs/reader --minutes 80")
def reader(
    data: Annotated[Path, typer.Option(help="Directory with train/ and dev/ as the model card names them.")],
    out: Annotated[Path, typer.Option(help="Where the tokenizer, the checkpoint and the bundle go.")],
    minutes: Annotated[float | None, typer.Option(help="Training time; the learning rate ends with it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps instead, for reproducible runs.")] = None,
    start_from: Annotated[Path | None, typer.Option(help="Bundle whose weights and tokenizer to start from.")] = None,
    stretch_rope: Annotated[
        bool, typer.Option("--stretch-rope", help="Give that bundle a new reader's rotations, for longer prompts.")
    ] = False,
    masks: Annotated[
        Literal["both", "full"], typer.Option(help="full: never train under the block mask, for comparison.")
    ] = "both",
    learning_rate: Annotated[float, typer.Option(help="Peak; 1e-3 to go on from a bundle.")] = 2e-3,
    size: Annotated[
        Literal["6m", "28m"], typer.Option(help="Parameters of a reader trained from scratch; 28m wants a GPU.")
    ] = "6m",
    tokens_per_step: Annotated[int, typer.Option(min=500, help="Tokens of a step; 100,000 suits a GPU.")] = 5000,
    related_words: Annotated[
        Path | None,
        typer.Option(help="Sentence encoder's directory; questions in other words take theirs from its embeddings."),
    ] = None,
    evidence: Annotated[
        float, typer.Option(min=0, help="Weight of the loss that shows the attention where answers stand; 0: none.")
    ] = 0.5,
    passage_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of passage tokens that the loss looks at; fewer are faster.")
    ] = 0.5,
    feeders: Annotated[int, typer.Option(min=0, help="Processes that prepare batches ahead; a GPU wants many.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train a small reader, from scratch with its own tokenizer or from a bundle; run again to go on after a stop."""
    from blockrag.training.config import SHAPES, ReaderTrainingConfig
    from blockrag.training.reader import TrainingProgress, train_reader

    with console.errors_to_exit():
        if (minutes is None) == (steps is None):
            raise SetupError("give exactly one of --minutes and --steps")
        config = ReaderTrainingConfig(
            data_dir=data,
            out_dir=out,
            minutes=minutes,
            steps=steps,
            start_from=start_from,
            stretch_rope=stretch_rope,
            masks=masks,
            learning_rate=learning_rate,
            shape=SHAPES[size],
            tokens_per_step=tokens_per_step,
            parts=1 if device.startswith("cuda") else ReaderTrainingConfig.parts,
            related_words=related_words,
            evidence=evidence,
            passage_share=passage_share,
            feeders=feeders,
            seed=seed,
            device=device,
        )
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console.err, disable=as_json) as bar:
            task = bar.add_task("loading", total=1.0)

            def show(progress: TrainingProgress) -> None:
                speed = progress.tokens / max(progress.seconds, 1e-9)
                text = f"step {progress.step}  loss {progress.answer_loss:.3f}  {speed:,.0f} tokens/s"
                bar.update(task, completed=progress.fraction, description=text)
                if as_json:
                    console.print_json_line(progress)
                elif progress.probe_exact is not None:
                    found = ", ".join(f"{exact:.1%} of {name}" for name, exact in progress.probe_exact.items())
                    bar.console.print(f"step {progress.step}: held-out questions exact: {found}")

            try:
                bundle = train_reader(config, show)
            except OSError as error:
                raise SetupError(f"data: {error}") from error
        if as_json:
            console.print_json_line({"bundle": bundle})
        else:
            console.out.print(f"bundle: {bundle}")
