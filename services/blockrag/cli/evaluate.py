"""``blockrag eval``: how good the answers are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.markdown import Markdown
from rich.table import Table

from blockrag.cli import console
from blockrag.cli.console import Connection, JsonOption, SettingsOption
from blockrag.cli.measured import counted, environment, names, parse_numbers, parse_rates, write_results
from blockrag.cli.options import command_of
from blockrag.client import BlockragClient
from blockrag.corpus.sample import Question, load_questions
from blockrag.errors import SetupError
from blockrag.evaluation.experiment_options import MODES, MOST_PASSAGES, CompressionOptions, Mode, QaOptions
from blockrag.results import AttentionModeName, GenerateOptions, Passage
from blockrag.settings import Settings

if TYPE_CHECKING:
    from blockrag.evaluation.almanac import AlmanacScores
    from blockrag.evaluation.compression_run import CompressionRun
    from blockrag.evaluation.qa import QaRun


DataOption = Annotated[
    Path, typer.Option(help="Questions (JSONL, may be gzipped), or a directory with dev/wiki_pattern_qa.jsonl.gz.")
]
QuestionsOption = Annotated[int, typer.Option(min=1, help="How many questions to draw.")]
BundleOption = Annotated[Path | None, typer.Option(help="Bundle; default: the settings', or the one that ships.")]
TypeOption = Literal["float32", "bfloat16"]
ComputeTypeOption = Annotated[
    TypeOption | None, typer.Option(help="Type of weights and activations; default: the settings', as served.")
]
KvType = Literal["float32", "bfloat16", "int8"]
KvTypeOption = Annotated[KvType | None, typer.Option(help="Type of cached K and V; default: the settings', as served.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the draw and of the intervals.")]


def measured_settings(
    settings: Path | None, bundle: Path | None, compute_dtype: TypeOption | None, kv_dtype: KvType | None
) -> Settings:
    """Settings of the system that is measured: those of a command's options, where they were given."""
    loaded = console.settings_from(settings)
    given = {"path": bundle and str(bundle), "compute_dtype": compute_dtype, "kv_dtype": kv_dtype}
    changed = {name: value for name, value in given.items() if value is not None}
    return loaded.model_copy(update={"bundle": loaded.bundle.model_copy(update=changed)})


Options = TypeVar("Options")


@command_of(QaOptions, left_out=["settings"])
def qa(
    options: QaOptions,
    data: DataOption,
    modes: Annotated[
        str, typer.Option(help="Of full, block, no-reencoding, none; separated by commas.")
    ] = "full,block",
    counts: Annotated[str, typer.Option(help="Further numbers of passages, e.g. 1,5,20.")] = "",
    settings: SettingsOption = None,
    bundle: BundleOption = None,
    compute_dtype: ComputeTypeOption = None,
    kv_dtype: KvTypeOption = None,
    out: Annotated[Path | None, typer.Option(help="Directory for qa.json, qa.md, answers.jsonl, places.png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask questions with the right passage among others, and score every mode on the same questions."""
    from blockrag.evaluation.qa import run_qa

    options = replace(
        options,
        settings=measured_settings(settings, bundle, compute_dtype, kv_dtype),
        data=data,
        modes=_chosen_modes(modes),
        counts=parse_numbers(counts, "--counts", most=MOST_PASSAGES),
    )
    _measure(run_qa, options, _qa_files, out, as_json, draws=options.places > 0)


@command_of(CompressionOptions, left_out=["settings"])
def compression(
    options: CompressionOptions,
    rates: Annotated[
        str, typer.Option(help="Tokens per slot, separated by commas; default: 1, k/4, k/2, 3k/4, k of the bundle.")
    ] = "",
    selectors: Annotated[
        str, typer.Option(help="Who chooses what is expanded, separated by commas; default: all.")
    ] = "",
    settings: SettingsOption = None,
    bundle: BundleOption = None,
    compute_dtype: ComputeTypeOption = None,
    kv_dtype: KvTypeOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for compression.json, compression.md, compression.png, answers.jsonl."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask questions and predict paragraphs at several rates, with every way to choose what stays word for word."""
    from blockrag.evaluation.compression_run import run_compression

    options = replace(
        options,
        settings=measured_settings(settings, bundle, compute_dtype, kv_dtype),
        rates=tuple(sorted(parse_rates(rates, "--rates"))),
        selectors=names(selectors),
    )
    _measure(run_compression, options, _compression_files, out, as_json, draws=True)


def _measure(
    run: Callable[[Options, Callable[[int, int], None], Callable[[str], None]], Any],
    options: Options,
    files: Callable[[Any], Mapping[str, bytes]],
    out: Path | None,
    as_json: bool,
    *,
    draws: bool,
) -> None:
    """Runs it under a bar, writes its files to ``out`` and prints its report."""
    if out is not None and draws:
        from blockrag.evaluation.plots import load_figure

        load_figure()  # before hours of work, not after
    with counted() as tell:
        found = run(options, tell, lambda what: tell(what=what))
    if out is not None:
        write_results(out, files(found))
    console.answer(as_json, found.report, Markdown(found.report.to_markdown()))


def _chosen_modes(text: str) -> tuple[Mode, ...]:
    chosen = names(text)
    unknown = [mode for mode in chosen if mode not in MODES]
    if unknown or not chosen:
        raise SetupError(f"--modes: {', '.join(unknown) or 'none given'}; choose of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in chosen)


def _qa_files(run: QaRun) -> dict[str, bytes]:
    from blockrag.evaluation.experiment import answer_lines
    from blockrag.evaluation.plots import plot_places

    outputs = {f"{cell.label}, {cell.condition.label}": found for cell, found in run.answers.items()}
    files = {
        **run.report.files("qa"),
        "answers.jsonl": answer_lines(run.questions, {"outputs": outputs}).encode(),
    }
    if any(score.place is not None for score in run.report.results.scores):
        files["places.png"] = plot_places(run.report)
    return files


def _compression_files(run: CompressionRun) -> dict[str, bytes]:
    from blockrag.evaluation.experiment import answer_lines
    from blockrag.evaluation.plots import plot_compression

    files = {**run.report.files("compression"), "compression.png": plot_compression(run.report)}
    if run.questions:
        cells = {f"{cell.rate:g}, {cell.label}": found for cell, found in run.answers.items()}
        columns = {
            "outputs": {label: found.outputs for label, found in cells.items()},
            "slots": {label: found.slots.tolist() for label, found in cells.items()},
        }
        files["answers.jsonl"] = answer_lines(run.questions, columns).encode()
    return files


def retrieval(
    data: DataOption,
    settings: SettingsOption = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that passages are split for; default: the one that ships with blockrag.")
    ] = None,
    questions: QuestionsOption = 1000,
    at: Annotated[str, typer.Option(help="Numbers of results to score, separated by commas.")] = "1,5,10,20",
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for retrieval.json and retrieval.md.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Index a file's passages as serving does, search for its questions, and score the ranks of the right ones."""
    with console.errors_to_exit():
        wanted = parse_numbers(at, "--at", most=1000)
        if not wanted:
            raise SetupError("--at: name at least one number of results")
        retriever = console.settings_from(settings).retriever
        from blockrag.evaluation.retrieval import RetrievalOptions, evaluate_retrieval
        from blockrag.modeling.bundle import DEFAULT_BUNDLE

        options = RetrievalOptions(data, bundle or DEFAULT_BUNDLE, retriever, questions, wanted, seed)
        with counted("reading the questions") as tell:
            report = asyncio.run(evaluate_retrieval(options, lambda what, done, total: tell(done, total, what)))
        if out is not None:
            write_results(out, report.files("retrieval"))
        console.answer(as_json, report, Markdown(report.to_markdown()))


app = typer.Typer(no_args_is_help=True, help="Evaluate the reader and the whole path.")


app.command(epilog="Example: blockrag eval qa --data dev/xquad_en.jsonl.gz --passages 5 --out results/xquad")(qa)
app.command(epilog="Example: blockrag eval retrieval --data dev/xquad_en.jsonl.gz --out results/xquad")(retrieval)

app.command(epilog="Example: blockrag eval compression --data data --text data/dev/books.jsonl.gz --out results/rates")(
    compression
)


@app.command(epilog="Example: blockrag up && blockrag ingest --almanac && blockrag eval almanac --json")
@command_of(Connection, last=True)
def almanac(
    connection: Connection,
    collection: Annotated[str, typer.Option(help="Collection that holds the almanac.")] = "almanac",
    top_k: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 5,
    max_context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most passage tokens in the prompt; the rest is retrieved and dropped.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Ask only the first so many questions; 0: all.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Questions in flight.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Ask the almanac's questions over gRPC, through retrieval, in every attention mode."""
    questions = load_questions()
    questions = questions[:limit] if limit else questions
    budget = GenerateOptions(max_context_tokens=max_context_tokens) if max_context_tokens else GenerateOptions()
    with console.progress_bar() as bar:
        tasks = {mode: bar.add_task(mode, total=len(questions)) for mode in ("block", "full", "none")}
        scores = connection.run(
            lambda client: _ask_almanac(
                client,
                questions,
                GenerateOptions(collection=collection, top_k=top_k, **budget),
                concurrency,
                lambda mode, done: bar.update(tasks[mode], completed=done),
            )
        )
    asked = {"top_k": top_k, "max_context_tokens": max_context_tokens}
    table = Table("mode", f"recall@{scores.recall_at}", "exact match", "F1", "failed")
    for row in scores.modes:
        recall = "–" if row.recall is None else f"{row.recall:.1%}"
        table.add_row(row.mode, recall, f"{row.exact_match:.1%}", f"{row.f1:.1%}", str(row.failed))
    console.answer(as_json, {"scores": scores, **asked, "environment": environment()}, table)


async def _ask_almanac(
    client: BlockragClient,
    questions: list[Question],
    options: GenerateOptions,
    concurrency: int,
    progress: Callable[[AttentionModeName, int], None],
) -> AlmanacScores:
    from blockrag.evaluation.almanac import evaluate_almanac

    async def ask(question: str, mode: AttentionModeName) -> tuple[str, Sequence[Passage]]:
        chosen: GenerateOptions = {**options, "attention_mode": mode}
        answer = await client.ask(question, **chosen)
        return answer.text, answer.passages

    return await evaluate_almanac(questions, ask, concurrency=concurrency, progress=progress)
