"""The command ``blockrag``: one module per group of commands, put together here."""

from __future__ import annotations

import sys

import typer

from blockrag import __version__
from blockrag.cli import adapt_pear, ask, bench, bench_load, bundles, demo, documents, evaluate, system, top

app = typer.Typer(
    name="blockrag",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="RAG whose time to first token does not grow with what it retrieves.",
    epilog="First steps:  blockrag demo  ·  blockrag up  ·  blockrag ingest docs/  ·  blockrag ask 'What is …?'",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for module in (system, top, documents, ask, demo):
    module.register(app)
bench_load.register(app, bench.app)
app.add_typer(bench.app, name="bench")
app.add_typer(bundles.app, name="bundle")
app.add_typer(adapt_pear.app, name="adapt")  # with the commands of ``adapt``
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    """Entry point of the console script. A command that needs more than the client says what to install."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "blockrag"):
            raise
        typer.echo(
            f"error: this command needs the package {missing}: pip install 'blockrag[serve]' for the system, "
            "'blockrag[adapt]' for training and measuring",
            err=True,
        )
        sys.exit(1)
