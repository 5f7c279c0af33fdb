"""``blockrag bundle``: check, make and show bundles."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli import console
from blockrag.cli.console import JsonOption
from blockrag.distributed_training.own_ray import connected_ray

if TYPE_CHECKING:
    from blockrag.modeling.verify import VerifyReport
    from blockrag.types import BlockKV

app = typer.Typer(no_args_is_help=True, help="Check, make and show bundles.")

BundleArgument = Annotated[Path | None, typer.Argument(help="Directory; default: the one that ships with blockrag.")]
_SERVED = (
    ("float32", "float32", "none"),
    ("float32", "bfloat16", "none"),
    ("bfloat16", "bfloat16", "auto"),
    ("bfloat16", "int8", "auto"),
)
"""Types of the computation and of K and V, and weights of decode steps: from the most exact to the fastest."""


@app.command(epilog="Example: blockrag bundle verify my-bundle --json")
def verify(
    path: BundleArgument = None,
    store: Annotated[bool, typer.Option(help="Send blocks through Ray's object store too.")] = True,
    kv_dtype: Annotated[
        Literal["all", "float32", "bfloat16", "int8"],
        typer.Option(
            help="Of the cached K and V. float32 shows the smallest error; bfloat16, what is served, is checked with "
            "weights of each type."
        ),
    ] = "all",
    as_json: JsonOption = False,
) -> None:
    """The correctness gate: full mode against the stock model, block mode against an explicit mask. Exits with 1.

    A bundle that compresses chunks is checked for mixtures of full and compressed blocks too.
    """
    from blockrag.modeling.bundle import DEFAULT_BUNDLE, load_bundle
    from blockrag.modeling.verify import verify_bundle

    with console.errors_to_exit():
        with console.err.status("verifying"), _object_store(store) as through_store:
            reports = [
                verify_bundle(
                    load_bundle(path or DEFAULT_BUNDLE, compute_dtype=compute, kv_dtype=kv, weights=weights),
                    through_store=through_store,
                )
                for compute, kv, weights in _SERVED
                if kv_dtype in ("all", kv)
            ]
        passed = all(report.passed for report in reports)
        console.answer(as_json, {"passed": passed, "reports": reports}, *map(_verify_table, reports))
        if not passed:
            raise typer.Exit(1)


def _verify_table(report: VerifyReport) -> Table:
    weights = ", decode steps with weights in eight bits" if report.weights == "int8" else ""
    title = f"{report.bundle}, computed in {report.compute_dtype}, K and V in {report.kv_dtype}{weights}"
    columns = ("check", "largest difference", "allowed", "same first token", "KL, nats", "", "where it first differs")
    limits = report.limits
    table = Table(
        *columns,
        title=title,
        caption=f"allowed: {limits.agreement:.0%} of first tokens the same, KL divergence {limits.divergence:g}",
    )
    for check in report.checks:
        verdict = Text("passed", "green") if check.passed else Text("FAILED", "bold red")
        table.add_row(
            check.name,
            f"{check.max_difference:.1e}",
            f"{check.tolerance:.1e}",
            "" if check.agreement is None else f"{check.agreement:.1%}",
            "" if check.divergence is None else f"{check.divergence:.1e}",
            verdict,
            check.first_difference,
        )
    return table


@app.command(epilog="Example: blockrag bundle create ~/models/Llama-3.2-1B-Instruct my-bundle")
def create(
    model: Annotated[
        str, typer.Argument(help="Hugging Face checkpoint (safetensors, fast tokenizer), .gguf file or package:NAME.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    template: Annotated[
        Path | None,
        typer.Option(
            help="JSON file: instruction, passage, final, answer_prefix, end, refusal; default: by the chat template."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name; default: the directory's.")] = "",
    max_context_tokens: Annotated[int | None, typer.Option(help="Longest prompt and answer.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle from a model of your own. Nothing is trained: verify it, then adapt it.

    A checkpoint is copied. A GGUF file stays where it is; it is converted once per machine, into BLOCKRAG_CACHE or the
    user's cache directory.
    """
    from blockrag.modeling.bundle_writing import create_bundle
    from blockrag.modeling.chat_template import read_template

    with console.errors_to_exit():
        texts = read_template(template) if template is not None else None
        bundle = create_bundle(model, out, texts, name=name or out.name, max_context_tokens=max_context_tokens)
        line = f"bundle {bundle.name} ({bundle.fingerprint[:12]}) at {bundle.path}"
        console.answer(as_json, {"path": bundle.path, "fingerprint": bundle.fingerprint}, line)


_SHOWN = (
    *("name", "version", "path", "fingerprint", "max_context_tokens", "passage_tokens", "chunk_tokens"),
    *("base", "adapter", "token_rows", "template", "quality", "training", "pear", "refrag"),
)
"""Of a bundle, in this order."""


@app.command(epilog="Example: blockrag bundle show --json")
def show(path: BundleArgument = None, as_json: JsonOption = False) -> None:
    """Show a bundle's manifest, after checking every file against it."""
    from blockrag.modeling.bundle import DEFAULT_BUNDLE, load_bundle

    with console.errors_to_exit():
        bundle = load_bundle(path or DEFAULT_BUNDLE)
        found = {name: getattr(bundle, name) for name in _SHOWN}
        facts = {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in found.items()}
        if bundle.refrag is not None:
            fingerprints = {"fingerprint": bundle.compression_fingerprint, "policy_basis": bundle.policy_basis}
            facts["refrag"] = {**fingerprints, **facts["refrag"]}
        table = Table.grid(padding=(0, 2))
        for key, value in facts.items():
            shown = json.dumps(value, ensure_ascii=False, indent=1) if isinstance(value, dict) else str(value or "none")
            table.add_row(key, shown)
        console.answer(as_json, facts, table)


@contextmanager
def _object_store(wanted: bool) -> Iterator[Callable[[BlockKV], BlockKV]]:
    """A round trip through Ray's object store, or through pickle without Ray."""
    if not wanted:
        yield lambda block: pickle.loads(pickle.dumps(block))
        return
    with connected_ray():
        import ray

        yield lambda block: ray.get(ray.put(block))
