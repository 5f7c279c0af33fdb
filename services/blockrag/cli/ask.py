"""``blockrag ask | retrieve``, and filters as a person types them.

Filters are like ``region=Africa``, ``year>=1990``, ``kind!=draft,old``, ``city="Paris, France"``. What looks like a
number finds the number and the text, since a document may have either; what stands in quotes, and what has leading
zeros, is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from blockrag.cli import console
from blockrag.cli.console import CollectionOption, Connection, JsonOption
from blockrag.cli.options import command_of
from blockrag.client import BlockragClient
from blockrag.errors import InvalidRequestError, UnavailableError
from blockrag.metadata import MAX_EXACT
from blockrag.results import (
    ChunkFormName,
    Citation,
    Completion,
    Compression,
    Condition,
    GenerateOptions,
    Retrieved,
    TraceSpan,
    Usage,
)

FilterOption = Annotated[
    list[str] | None,
    typer.Option("--filter", "-f", help='Metadata: key=value, key="a, b", key!=a,b, author.name=Ann, key>=1.'),
]
_SHOWN_CHARS = 18
"""Of either end of what was compressed."""


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(epilog="Example: blockrag ask 'What is the capital of Fiji?' -c almanac --trace")(ask)
    app.command(epilog="Example: blockrag retrieve 'capital of Fiji' -c almanac -k 3 --json")(retrieve)


@command_of(Connection, last=True)
def ask(
    connection: Connection,
    question: Annotated[str, typer.Argument(help="The question.")],
    collection: CollectionOption = "default",
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Passages to retrieve.")] = None,
    mode: Annotated[Literal["block", "full", "none"], typer.Option(help="How to attend.")] = "block",
    filters: FilterOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait; the server has a limit of its own.")] = None,
    max_context_tokens: Annotated[int | None, typer.Option(help="Most passage tokens in the prompt.")] = None,
    rate: Annotated[
        str | None, typer.Option(help="Compress: passage tokens per slot of the prompt; auto: what the question needs.")
    ] = None,
    max_context_tokens_compressed: Annotated[
        int | None, typer.Option(help="Compress: most slots that the passages take, instead of --rate.")
    ] = None,
    max_ttft_ms: Annotated[
        float | None, typer.Option(help="Compress: most milliseconds to the first token, instead of --rate.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Who chooses what is read word for word: query, blind, sentences, retrieval.")
    ] = "",
    trace: Annotated[bool, typer.Option("--trace", help="Show the tree of spans.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a question; the answer streams in, with the passages that it was read from.

    With --rate, --max-context-tokens-compressed or --max-ttft-ms, passages are compressed chunk by chunk, and what was
    read word for word is printed.
    """
    given = {
        "top_k": top_k,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "timeout_s": timeout,
        "max_context_tokens": max_context_tokens,
    }
    options = GenerateOptions(collection=collection, attention_mode=mode, filter=parse_filters(filters or []))
    options.update({key: value for key, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    compression = Compression(_rate(rate), max_context_tokens_compressed, max_ttft_ms, policy)
    if compression != Compression():
        options["compression"] = compression
    connection.run(lambda client: _ask(client, question, options, trace, as_json))


def _rate(given: str | None) -> float | Literal["auto"] | None:
    if given is None or given == "auto":
        return given  # type: ignore[return-value]
    try:
        return float(given)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is neither a number nor auto", param_hint="--rate") from None


async def _ask(
    client: BlockragClient, question: str, options: GenerateOptions, with_trace: bool, as_json: bool
) -> None:
    retrieved, completion = Retrieved(()), None
    async for event in client.generate(question, **options):
        if isinstance(event, Retrieved):
            retrieved = event
        elif isinstance(event, Completion):
            completion = event
        elif not as_json:
            console.out.print(event, end="", highlight=False)
    if completion is None:
        raise UnavailableError("the answer ended without its completion; ask again")
    spans = await client.trace(completion.trace_id) if with_trace else ()
    if as_json:
        answer = {"retrieved": retrieved, "completion": completion}
        console.print_json({**answer, "trace": spans} if with_trace else answer)
        return
    console.out.print()
    print_citations(completion)
    for line in reading_lines(completion):
        console.out.print(line)
    if with_trace:
        console.out.print(span_tree(spans))


def print_citations(completion: Completion) -> None:
    """Citations, usage and stage times, for people."""
    for citation in completion.citations:
        place = f"{citation.title} · {citation.document_id}" if citation.document_id else citation.title
        note = "" if citation.in_prompt else f" — dropped: {citation.dropped_reason}"
        also = f" (also in {', '.join(holder.document_id for holder in citation.also_in)})" if citation.also_in else ""
        console.out.print(Text(f"  [{citation.index + 1}] {place}, {citation.tokens} tokens{also}{note}", "dim"))
    usage = completion.usage
    note = compression_note(usage)
    stages = "  ".join(f"{name} {value:.1f}" for name, value in completion.stages_ms.items())
    line = (
        f"  first token {completion.time_to_first_token_ms:.1f} ms · {usage.prompt_tokens} prompt tokens, "
        f"{usage.cached_tokens} cached{f' · {note}' if note else ''} · ms: {stages}"
    )
    console.out.print(Text(line, "dim"), highlight=False)


def reading_lines(completion: Completion) -> Iterator[Text]:
    """A paragraph for each passage in the prompt; nothing when the answer was not asked to compress.

    What was read word for word is printed as it is. What was compressed is dimmed and stands in ‹ ›, shortened to its
    beginning and end.
    """
    for citation in completion.citations:
        if citation.in_prompt and any(chunk.text for chunk in citation.chunks):
            yield _passage(citation)


def compression_note(usage: Usage) -> str:
    """How small the passages became; empty when nothing was compressed."""
    if not usage.compressed_chunks:
        return ""
    return f"{usage.context_tokens} passage tokens, {usage.compressed_chunks} chunks of them compressed"


def _passage(citation: Citation) -> Text:
    line = Text(f"  [{citation.index + 1}] ", style="dim")
    for form, run in groupby(citation.chunks, key=lambda chunk: chunk.form):
        words = "".join(chunk.text for chunk in run)
        line.append(*_shown(form, words))
    return line


def _shown(form: ChunkFormName, words: str) -> tuple[str, str]:
    if form == "expanded":
        return words, "default"
    if len(words) > 2 * _SHOWN_CHARS + 3:
        words = f"{words[:_SHOWN_CHARS].rstrip()} … {words[-_SHOWN_CHARS:].lstrip()}"
    lead = " " if words.startswith(" ") else ""
    return f"{lead}‹{words.strip()}›", "dim"


def span_tree(spans: tuple[TraceSpan, ...]) -> Tree:
    """The spans of one trace as a tree, each with its service, its start and how long it took."""
    known = {span.span_id for span in spans}
    start = min((span.start_unix_ns for span in spans), default=0)
    root = Tree("trace")

    def add(parent: Tree, parent_id: str | None) -> None:
        for span in spans:
            is_root = span.parent_span_id not in known
            if span.parent_span_id == parent_id or (parent_id is None and is_root):
                offset = (span.start_unix_ns - start) / 1e6
                label = Text.assemble(
                    (span.name, "bold"),
                    (f" {span.service} ", "dim"),
                    f"{span.milliseconds:.1f} ms",
                    (f" at {offset:.1f}", "dim"),
                    (f" {span.error}" if span.error else "", "red"),
                )
                add(parent.add(label, highlight=False), span.span_id)

    add(root, None)
    return root


@command_of(Connection, last=True)
def retrieve(
    connection: Connection,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    collection: CollectionOption = "default",
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Passages to retrieve.")] = None,
    filters: FilterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search without answering."""

    conditions = parse_filters(filters or [])
    passages = connection.run(
        lambda client: client.retrieve(query, collection=collection, top_k=top_k, filter=conditions)
    )
    table = Table("score", "document", "passage", show_lines=True)
    for passage in passages:
        names = [passage.document_id, *(holder.document_id for holder in passage.also_in)]
        table.add_row(f"{passage.score:.4f}", "\n".join(names), passage.text)
    console.answer(as_json, passages, table)
    if not as_json and not passages and conditions:
        console.err.print("no document fits the filter: a number equals no text, and keys are as in the metadata")


_FORM = re.compile(r"(?P<key>[^=!<>]+?)\s*(?P<sign>!=|>=|<=|=)\s*(?P<values>.*)", re.DOTALL)
_PART = re.compile(r'(?:^|(?<=,))(\s*"(?:[^"\\]|\\.)*"\s*|[^,"][^,]*|)(?=,|$)', re.DOTALL)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_OPERATORS: dict[str, Literal["in", "not_in", "at_least", "at_most"]] = {
    "=": "in",
    "!=": "not_in",
    ">=": "at_least",
    "<=": "at_most",
}


def parse_filters(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Conditions that must all hold. Raises ``InvalidRequestError`` for a text that is none."""
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> Condition:
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError("filter", f"{text!r}: write key=value, key!=value, key>=number or key<=number")
    operator = _OPERATORS[match["sign"]]
    if operator in ("at_least", "at_most"):
        bound = _number(match["values"].strip())
        if bound is None:
            raise InvalidRequestError("filter", f"{text!r}: {match['sign']} needs a number")
        return Condition(match["key"], operator, (bound,))
    return Condition(match["key"], operator, tuple(value for part in _parts(text, match) for value in _values(part)))


def _parts(text: str, match: re.Match[str]) -> list[str]:
    """What stands between commas; a comma in quotes is a character."""
    parts = _PART.findall(match["values"])
    if ",".join(parts) != match["values"]:
        raise InvalidRequestError("filter", f'{text!r}: a quote is not closed; write a quote within as \\"')
    return [part.strip() for part in parts]


def _values(part: str) -> tuple[str | float | bool, ...]:
    """What a part may stand for: 7 is a number, or a text of one digit; what is quoted is text."""
    if _QUOTED.fullmatch(part):
        return (re.sub(r"\\(.)", r"\1", part[1:-1]),)
    if part in ("true", "false"):
        return (part == "true", part)
    number = _number(part)
    # No document has a whole number that a double cannot hold: whoever keeps one keeps it as text.
    return (part,) if number is None or abs(number) >= MAX_EXACT else (number, part)


def _number(text: str) -> float | None:
    """As JSON writes numbers: 01234 is none, nor is nan."""
    if not _NUMBER.fullmatch(text):
        return None
    # The client refuses a whole number that would not be exact.
    return int(text) if text.removeprefix("-").isdecimal() else float(text)
