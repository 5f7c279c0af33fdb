"""``blockrag adapt``: make a checkpoint serve cached blocks well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from blockrag.cli import adapt_pear, adapt_refrag, console
from blockrag.cli.console import JsonOption
from blockrag.cli.training_workers import check_workers, training_workers

if TYPE_CHECKING:
    from blockrag.training.adaptation.config import BlockAdaptConfig
    from blockrag.training.adaptation.metrics import StepMetrics

app = typer.Typer(no_args_is_help=True, help="Adapt checkpoints and bundles.")


@app.command(epilog="Example: blockrag adapt block --model ~/models/Llama-3.2-1B --data qa.jsonl --out my-bundle")
def block(
    model: Annotated[
        Path, typer.Option(help="Hugging Face checkpoint, .gguf file, package:NAME, or a bundle to adapt further.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="JSONL(.gz) of question rows, or a directory; may be repeated. With --questions above 1 a file may be "
            "followed by =SHARE, its share of the contexts, and pattern questions are read too."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Bundle to make; the run itself lives in OUT.run beside it.")],
    name: Annotated[str, typer.Option(help="The bundle's name; default: the directory's.")] = "",
    template: Annotated[
        Path | None, typer.Option(help="JSON of the prompt template; default: the bundle's, or the chat template's.")
    ] = None,
    steps: Annotated[int, typer.Option(help="500 to 1000 suffice at 8B parameters.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Samples of a step, over all workers.")] = 16,
    micro_batch: Annotated[int, typer.Option(help="Samples of one pass; raise while memory lasts.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak; small models take more, 1e-4 at 10M.")] = 2e-5,
    warmup_steps: Annotated[int, typer.Option(help="Steps until the learning rate is reached.")] = 20,
    masks: Annotated[
        Literal["both", "mixed", "block", "full"],
        typer.Option(
            help="both: every sample under each. mixed: two of three under the block mask, the third under the full "
            "one. block, full: one alone, an ablation's sibling."
        ),
    ] = "both",
    questions: Annotated[
        int, typer.Option(help="Most questions behind one context; 1: each row by itself. 16 learns far more a token.")
    ] = 1,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="Question file that is evaluated on: passages like its own are left out. May be repeated."),
    ] = None,
    lora_rank: Annotated[
        int, typer.Option(help="Rank of a low-rank adapter that alone is trained; 0: all weights are.")
    ] = 0,
    min_passages: Annotated[int, typer.Option(help="Fewest passages of a sample.")] = 1,
    max_passages: Annotated[int, typer.Option(help="Most passages of a sample.")] = 20,
    passage_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a passage; default: the bundle's, or 128.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest sample; distractors are left out to keep it.")] = 4096,
    refusal_share: Annotated[float, typer.Option(help="Share of samples without the gold passage.")] = 0.1,
    distillation: Annotated[float, typer.Option(help="Weight of learning from the full mask; 0: off.")] = 0.0,
    link_tokens: Annotated[int, typer.Option(help="Trainable tokens after each passage.")] = 0,
    sink_tokens: Annotated[int, typer.Option(help="Trainable tokens before each passage.")] = 0,
    train: Annotated[
        Literal["all", "tokens"], typer.Option(help="What is trained: all weights, or link and sink tokens only.")
    ] = "all",
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the forward pass.")] = "bf16",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Save memory; a third slower.")] = True,
    attention: Annotated[
        Literal["auto", "flex", "dense"], typer.Option(help="FlexAttention (CUDA) or a dense mask; auto: what can.")
    ] = "auto",
    dev: Annotated[Path | None, typer.Option(help="Rows to measure on; default: some held out of DATA.")] = None,
    dev_rows: Annotated[int, typer.Option(help="Samples to measure on; 0: none.")] = 64,
    eval_steps: Annotated[int, typer.Option(help="Steps between two measurements.")] = 200,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    threads: Annotated[
        int,
        typer.Option(
            help="Micro-batches computed at a time on a CPU, each by one core; for busy machines, takes more memory."
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of samples and new tokens.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Workers of Ray Train, one GPU or CPU each; 1: this process.")] = 1,
    ray_address: Annotated[
        str, typer.Option(help="Ray cluster for the workers; default: one of this command's own.")
    ] = "",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard files to OUT.run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune under the block mask and the full mask, so that cached passages answer as well as a whole prompt.

    Run the same command again to go on after a stop.
    """
    from transformers.utils import logging

    from blockrag.training.adaptation.config import BlockAdaptConfig

    with console.errors_to_exit():
        logging.disable_progress_bar()  # ours shows what matters
        files, shares = _files_and_shares(data)
        config = BlockAdaptConfig(
            # workers have directories of their own
            model=model if str(model).startswith("package:") else model.expanduser().absolute(),
            data=files,
            shares=shares,
            exclude=tuple(path.expanduser().absolute() for path in exclude or ()),
            questions=questions,
            lora_rank=lora_rank,
            threads=threads,
            out=out.expanduser().absolute(),
            name=name,
            template_file=template.expanduser().absolute() if template else None,
            steps=steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            masks=masks,
            min_passages=min_passages,
            max_passages=max_passages,
            passage_tokens=passage_tokens,
            max_tokens=max_tokens,
            refusal_share=refusal_share,
            distillation=distillation,
            link_tokens=link_tokens,
            sink_tokens=sink_tokens,
            train=train,
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            attention=attention,
            dev=dev.expanduser().absolute() if dev else None,
            dev_rows=dev_rows,
            eval_steps=eval_steps,
            checkpoint_steps=checkpoint_steps,
            seed=seed,
            device=device,
            tensorboard=tensorboard,
        )
        with _shown(as_json) as show:
            bundle = _run(config, workers, ray_address, show)
        if as_json:
            console.print_json_line({"bundle": bundle, "run": config.run_dir})
        else:
            console.out.print(f"bundle: {bundle}\nmetrics: {config.run_dir}\ncheck it: blockrag bundle verify {bundle}")


def _files_and_shares(data: list[str]) -> tuple[tuple[Path, ...], tuple[float, ...]]:
    """FILE or FILE=SHARE each; no shares where none is named, and 1 for files without one where another has one."""
    files: list[Path] = []
    shares: list[float | None] = []
    for text in data:
        name, separator, share = text.rpartition("=")
        try:
            value = float(share) if separator else None
        except ValueError:
            name, value = text, None  # a file whose name holds the sign
        files.append(Path(name if value is not None else text).expanduser().absolute())
        shares.append(value)
    named = any(share is not None for share in shares)
    return tuple(files), tuple(1.0 if share is None else share for share in shares) if named else ()


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
                bar.console.print(f"left out: {place} needs at least {tokens} tokens")
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


adapt_pear.register(app)
adapt_refrag.register(app)
